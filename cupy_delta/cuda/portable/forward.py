"""The launches of the walk over the chunks, of its segments, and of outputs from states."""

from __future__ import annotations

import numpy as np

from ...problem import Problem
from ..spec import DeviceFacts, Launch, carve, fits, i32, normal, padded, pitch, slots, variant

# Chunks per segment for which cutting a sequence pays its extra launches (measured on an H200).
SEGMENT_CHUNKS = 64


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
        "portable/segment_states.cu",
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
        "portable/forward.cu",
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
        "portable/chunk_output.cu",
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
