"""The launches of each kernel for a problem: macros, grid, shared memory, arguments.

Pure Python; shared memory is counted as the kernels carve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..problem import Problem

C_TYPES = {"float64": "double", "float32": "float", "float16": "f16", "bfloat16": "bf16"}
# Of the walk by tokens: threads per block, and key channels per thread.
TOKEN_THREADS = 128
TOKEN_KEYS = 32
# Chunks per segment for which cutting a sequence pays its extra launches (measured on an H200).
SEGMENT_CHUNKS = 64


class DeviceFacts(NamedTuple):
    """What a plan depends on: multiprocessors, shared memory of a block, compute capability."""

    sm_count: int
    shared_bytes: int
    capability: tuple[int, int] = (8, 0)


@dataclass(frozen=True)
class TensorBox:
    """A kernel argument: the TMA map of an array of 16-bit elements in four axes, and a box."""

    name: str
    shape: tuple[int, int, int, int]
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch. Arguments are NumPy scalars, names of arrays, boxes, or None for null.

    Compared by identity: plans are kept, and so is what was compiled for their launches. `arch` is
    the one architecture that a kernel is for, if its instructions exist on no other. One that is
    `beside` may run at the same time as the next one; both end before the one after that begins.
    """

    file: str
    entry: str
    defines: tuple
    grid: int
    block: int
    shared: int
    arguments: tuple
    arch: str = ""
    beside: bool = False

    @cached_property
    def pointers(self) -> tuple[tuple[int, str], ...]:
        """Which arguments are arrays: position and name."""
        return tuple((i, a) for i, a in enumerate(self.arguments) if isinstance(a, str))

    @cached_property
    def boxes(self) -> tuple[tuple[int, TensorBox], ...]:
        """Which arguments are maps of arrays: position and box."""
        return tuple((i, a) for i, a in enumerate(self.arguments) if isinstance(a, TensorBox))

    def arrays(self) -> set[str]:
        """Return the names of the arrays that the kernel is given."""
        return {name for _, name in self.pointers} | {box.name for _, box in self.boxes}


def i32(x: int) -> np.int32:
    return np.int32(x)


# ---- shared memory, as the kernels carve it ------------------------------------------------------


def padded(size: int) -> int:
    return -(-size // 16) * 16


def pitch(columns: int, itemsize: int) -> int:
    return columns + 16 // itemsize


def carve(*arrays: tuple[int, int], align: int = 16, start: int = 0) -> int:
    """Return where arrays (count, itemsize) end that begin at `start`, each aligned."""
    end = start
    for count, itemsize in arrays:
        end = -(-end // align) * align + count * itemsize
    return end


def slots(problem: Problem, chunk: int) -> int:
    """Chunk slots of all batch rows: the upper bound that needs no value of cu_seqlens."""
    return problem.chunk_slots(chunk) * problem.B


def variant(problem: Problem, chunk: int, **more) -> tuple:
    """Return the macros that every chunked kernel has, and some of its own."""
    common = dict(
        DTYPE=C_TYPES[problem.dtype.name],
        HEAD_K=problem.K,
        HEAD_V=problem.V,
        CHUNK=chunk,
        HAS_GATE=int(problem.g is not None),
        VARLEN=int(problem.cu_seqlens is not None),
    )
    return tuple((common | more).items())


def fits(what: str, chunk: int, shared: int, facts: DeviceFacts) -> None:
    if shared > facts.shared_bytes:
        raise NotImplementedError(
            f"chunk_size = {chunk}: {what} would need {shared} bytes of shared memory per block,"
            f" this GPU has {facts.shared_bytes}; a smaller chunk_size works"
        )


# ---- the kernels ---------------------------------------------------------------------------------


def wy_factors_launch(problem: Problem, chunk: int, facts: DeviceFacts, factors: bool) -> Launch:
    """The core and P for the walk, or with `factors` the public T, W and U."""
    size, K, V = problem.dtype.itemsize, padded(problem.K), padded(problem.V)
    square = (chunk * pitch(chunk, 4), 4)
    half = (chunk // 2 * pitch(chunk, 4), 4)
    rows = (chunk * pitch(K, size), size)
    if factors:
        first = [rows, (chunk * pitch(V, size), size), (chunk * pitch(chunk, size), size)]
    else:
        first = [rows, rows, square]
    shared = carve(*first, square, square, square, half, (chunk, 4), (chunk, 8))
    fits("the WY factors", chunk, shared, facts)
    running_sum = "G" if problem.g is not None else None
    names = (
        (None, None, None, "t", "w", "u") if factors else ("core", "p", running_sum) + (None,) * 3
    )
    return Launch(
        "wy_factors.cu",
        "wy_factors",
        variant(problem, chunk, WRITE_CORE=int(not factors), WRITE_WU=int(factors)),
        slots(problem, chunk) * problem.H if problem.T else 0,
        128,
        shared,
        (
            None if factors else normal(problem, "q"),
            normal(problem, "k"),
            "v" if factors else None,
            "beta",
            "g",
            "cu_seqlens",
            *names,
            i32(problem.N),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


def walk_shape(
    problem: Problem, V: int, chunk: int, facts: DeviceFacts, row_tiles: int, walked: int = 1
) -> tuple[int, int]:
    """Return (16-row tiles of value channels per warp, warps per block) for a walk.

    `walked` is the number of segments of each sequence that are walked.

    Up to four warps share the keys of a block; fewer where the blocks would leave more than a
    quarter of the multiprocessors idle, down to two.
    """
    rows = padded(V) // 16
    row_tiles = 1 if problem.dtype.itemsize == 4 or chunk > 32 else min(row_tiles, rows)
    warps = min(4, -(-rows // row_tiles))
    sequences = problem.N * problem.HV * walked
    # Measured on an H200: wide blocks once they fill three quarters of it, but at least two warps.
    while warps > 2 and sequences * -(-rows // (row_tiles * warps)) < 0.75 * facts.sm_count:
        warps = -(-warps // 2)
    return row_tiles, warps


def segment_count(problem: Problem, chunk: int, facts: DeviceFacts) -> int:
    """Segments to cut every sequence into: 1, or 4 or 8 for long sequences of few heads.

    Cutting costs a walk of [P | H], about 4/3 of the walk itself: two segments gain nothing, and
    nothing is gained where one walk takes half of the multiprocessors.
    """
    blocks = problem.N * problem.HV * -(-padded(problem.V) // 32)
    chunks = problem.B * problem.T // (chunk * max(1, problem.N))
    for segments in (8, 4):
        if blocks and 2 * blocks <= facts.sm_count and chunks >= segments * SEGMENT_CHUNKS:
            return segments
    return 1


def segment_states_launch(problem: Problem, segments: int) -> Launch:
    """The states that enter all segments, from the transfers of all but the last."""
    defines = dict(
        HEAD_K=problem.K,
        HEAD_V=problem.V,
        SEGMENTS=segments,
        STATE_VK=int(problem.state_layout == "vk"),
    )
    columns = (padded(problem.K) * 8, 4)
    return Launch(
        "segment_states.cu",
        "segment_states",
        tuple(defines.items()),
        problem.N * problem.HV * -(-problem.V // 8),
        128,
        carve(columns, columns),
        ("initial_state", "segment_p", "segment_h", "entering", i32(problem.HV)),
    )


def walk_launch(
    problem: Problem,
    chunk: int,
    facts: DeviceFacts,
    *,
    factors: bool = False,
    zero_v: bool = False,
    segments: int = 1,
    transfer: bool = False,
    states: str | None = None,
    output: str | None = "o",
    initial: str | None = "initial_state",
    final: str = "final_state",
) -> Launch:
    """The walk over the chunks, of a sequence's segments at once.

    With `transfer` of all segments but the last, from zero, or with `zero_v` from the identity.
    `states` is the C type of written states, or None.
    """
    walked = segments - 1 if transfer else segments
    size, K = problem.dtype.itemsize, padded(problem.K)
    V = problem.K if zero_v else problem.V
    tiles = 2 if K <= 64 else 1
    row_tiles, warps = walk_shape(problem, V, chunk, facts, tiles, walked)
    slice_ = 16 * row_tiles * warps
    square = (chunk * pitch(chunk, size), size)
    key_rows = (chunk * pitch(K, size), size)
    stage = [key_rows, (chunk * pitch(slice_, size), size)]
    if not transfer:
        stage.append(key_rows)
    if not factors:
        stage += [square, (chunk, 4), (chunk, 8)]
    if not factors and not transfer:
        stage.append(square)
    shared = carve(*stage, *stage)
    fits("the state pass", chunk, shared, facts)
    defines = variant(
        problem,
        chunk,
        HEAD_V=V,
        STATE_VK=int(problem.state_layout == "vk" and not zero_v),
        FROM_FACTORS=int(factors),
        ZERO_V=int(zero_v),
        SEGMENTS=segments,
        TRANSFER=int(transfer),
        WRITE_STATES=int(states is not None),
        STATES_DTYPE=states or "float",
        WARPS=warps,
        ROW_TILES=row_tiles,
    )
    return Launch(
        "forward.cu",
        "forward",
        defines,
        problem.N * walked * problem.HV * -(-padded(V) // slice_),
        32 * warps,
        shared,
        (
            "w" if factors else normal(problem, "q"),
            normal(problem, "k"),
            None if zero_v else ("u" if factors else "v"),
            None if factors else "core",
            None if factors else "p",
            None if factors else "beta",
            "G" if problem.g is not None else None,
            initial,
            "cu_seqlens",
            output,
            final,
            "states" if states else None,
            ("v_new" if factors else "corrections") if states else None,
            np.float32(problem.scale),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


def norm_launch(problem: Problem, name: str, rows: str, backward: bool = False) -> Launch:
    """q or k normalised into `rows`; or the gradient in `rows` carried back through the norm."""
    count = problem.B * problem.T * problem.H
    defines = dict(DTYPE=C_TYPES[problem.dtype.name], HEAD_K=problem.K, BACKWARD=int(backward))
    arguments = (name, rows, np.int64(count))
    return Launch("l2norm.cu", "l2norm", tuple(defines.items()), -(-count // 8), 256, 0, arguments)


def normal(problem: Problem, name: str) -> str:
    """Name of the array that the chunked kernels read for q or k."""
    return f"{name}_normal" if problem.qk_l2norm else name


def backward_state_launch(
    problem: Problem, chunk: int, facts: DeviceFacts, has_dfinal: bool
) -> Launch:
    """The reverse walk: the gradient of the state leaving each chunk, and G."""
    size, K = problem.dtype.itemsize, padded(problem.K)
    # A warp alone waits for its own loads: two are faster on an H200 with 8 and with 32 heads.
    row_tiles, warps = walk_shape(problem, problem.V, chunk, facts, row_tiles=1)
    slice_ = 16 * row_tiles * warps
    key_rows = (chunk * pitch(K, size), size)
    square = (chunk * pitch(chunk, size), size)
    stage = [key_rows, key_rows, (chunk * pitch(slice_, size), size), square, square, (chunk, 4)]
    shared = carve(*stage, *stage)
    fits("the gradients' state pass", chunk, shared, facts)
    return Launch(
        "backward_state.cu",
        "backward_state",
        variant(
            problem,
            chunk,
            STATE_VK=int(problem.state_layout == "vk"),
            WARPS=warps,
            ROW_TILES=row_tiles,
        ),
        problem.N * problem.HV * -(-padded(problem.V) // slice_),
        32 * warps,
        shared,
        (
            normal(problem, "q"),
            normal(problem, "k"),
            "core",
            "p",
            "beta",
            "do",
            "dfinal_state" if has_dfinal else None,
            "cu_seqlens",
            "dstates",
            "g_rows",
            "dinitial_state",
            np.float32(problem.scale),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


def backward_chunk_launch(problem: Problem, chunk: int, facts: DeviceFacts) -> Launch:
    """The chunk-parallel gradients, with as wide a slice of values as fits."""
    size, K, V = problem.dtype.itemsize, padded(problem.K), padded(problem.V)
    # So that the sums over the group fit the registers of a warp.
    warps = 8 if K > 128 or (chunk == 64 and K > 64) else 4
    key_rows = (chunk * pitch(K, size), size)
    square = (chunk * pitch(chunk, size), size)
    for slice_ in (64, 32, 16) if size == 2 else (32, 16):
        slice_ = min(slice_, V)
        state, rows = (slice_ * pitch(K, size), size), (chunk * pitch(slice_, size), size)
        arrays = [key_rows, key_rows, state, state, rows, rows, rows, square, square, square]
        shared = carve(*arrays, (chunk, 4), (chunk, 4))
        if shared <= facts.shared_bytes:
            break
    fits("the gradients", chunk, shared, facts)
    return Launch(
        "backward_chunk.cu",
        "backward_chunk",
        variant(problem, chunk, WARPS=warps, SLICE=slice_),
        slots(problem, chunk) * problem.H if problem.T else 0,
        32 * warps,
        shared,
        (
            normal(problem, "q"),
            normal(problem, "k"),
            "beta",
            "corrections",
            "g_rows",
            "do",
            "states",
            "dstates",
            "cu_seqlens",
            "dq",
            "dk",
            "dv",
            "dbeta",
            np.float32(problem.scale),
            i32(problem.N),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


def chunk_output_launch(problem: Problem, chunk: int, facts: DeviceFacts) -> Launch:
    """Outputs of all chunks from their states."""
    size, K, V = problem.dtype.itemsize, padded(problem.K), padded(problem.V)
    slice_ = min(V, 64)
    shared = carve(
        (chunk * pitch(K, size), size),
        (chunk * pitch(K, size), size),
        (chunk * pitch(slice_, size), size),
        (K * pitch(slice_, size), size),
        (chunk * pitch(chunk, size), size),
    )
    fits("chunk outputs", chunk, shared, facts)
    slices = -(-V // slice_)
    return Launch(
        "chunk_output.cu",
        "chunk_output",
        variant(problem, chunk, SLICE=slice_),
        slots(problem, chunk) * problem.HV * slices if problem.T else 0,
        128,
        shared,
        (
            "q",
            "k",
            "v_new",
            "states",
            "cu_seqlens",
            "o",
            np.float32(problem.scale),
            i32(problem.N),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


def token_launch(problem: Problem) -> Launch:
    """The walk token by token."""
    real = problem.compute_dtype
    # Threads that share a value channel's keys, up to TOKEN_KEYS each; value channels per block.
    parts = 1
    while parts * TOKEN_KEYS < problem.K:
        parts *= 2
    per_warp = 32 // parts
    channels = min(TOKEN_THREADS // parts, -(-problem.V // per_warp) * per_warp)
    defines = dict(
        DTYPE=C_TYPES[problem.dtype.name],
        HEAD_K=problem.K,
        HEAD_V=problem.V,
        HAS_GATE=int(problem.g is not None),
        VARLEN=int(problem.cu_seqlens is not None),
        STATE_VK=int(problem.state_layout == "vk"),
        L2NORM=int(problem.qk_l2norm),
        BETA_PER_VALUE=int(problem.beta_per_value),
        PARTS=parts,
        CHANNELS=channels,
    )
    return Launch(
        "recurrent.cu",
        "recurrent",
        tuple(defines.items()),
        problem.N * problem.HV * -(-problem.V // channels),
        channels * parts,
        4 * problem.K * real.itemsize,
        (
            "q",
            "k",
            "v",
            "beta",
            "g",
            "initial_state",
            "cu_seqlens",
            "o",
            "final_state",
            real.type(problem.scale),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


def affine_launch(shape: tuple, columns: int, dtype, add: bool) -> Launch:
    """P X, or with `add` P X + H, for stacks (N, HV, K, .)."""
    N, HV, K = shape
    defines = dict(REAL=C_TYPES[dtype.name], ADD=int(add))
    count = N * HV * K * columns
    arguments = ("p", "x", "h", "y", np.int64(count), i32(K), i32(columns))
    return Launch(
        "affine.cu", "affine", tuple(defines.items()), -(-count // 256), 256, 0, arguments
    )
