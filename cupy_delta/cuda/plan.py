"""From a Problem and facts of a device to kernel launches. Pure Python; nothing here needs a GPU.

What the kernels do not do is refused here, naming the option and what would work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from ..problem import Problem

C_TYPES = {"float64": "double", "float32": "float", "float16": "f16", "bfloat16": "bf16"}
MAX_HEAD = 256
CHUNKS = (16, 32, 64)
DEFAULT_CHUNK = {"float32": 16, "float16": 32, "bfloat16": 32}


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan depends on: multiprocessors, and dynamic shared memory a block may have."""

    sm_count: int
    shared_bytes: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Arguments are NumPy scalars, names of arrays, or None for null."""

    file: str
    entry: str
    defines: tuple
    grid: int
    block: int
    shared: int
    arguments: tuple


@dataclass(frozen=True)
class Plan:
    """Launches in order, and the arrays to make for them: name -> (shape, dtype)."""

    launches: tuple
    outputs: dict
    workspace: dict = field(default_factory=dict)


def i32(x: int) -> np.int32:
    return np.int32(x)


# ---- what can be asked for -----------------------------------------------------------------------


def check_heads(problem: Problem) -> None:
    for name, size in (("K", problem.K), ("V", problem.V)):
        if size > MAX_HEAD:
            raise NotImplementedError(
                f"{name} = {size}: CuPy arrays support head sizes up to {MAX_HEAD};"
                " NumPy arrays any"
            )


def check_gate(problem: Problem) -> None:
    if problem.gate == "channel":
        raise NotImplementedError(
            "g: a gate per key channel, (B, T, HV, K), is not supported on CuPy arrays;"
            " a scalar gate (B, T, HV) is, and NumPy arrays support both"
        )


def chunk_of(problem: Problem) -> int:
    """Return the chunk size in force, or refuse what the chunked kernels do not do."""
    check_heads(problem)
    check_gate(problem)
    if problem.dtype.name == "float64":
        raise NotImplementedError(
            "float64: the chunked operators on CuPy arrays take float32, float16 and bfloat16;"
            " recurrent_delta_rule and delta_rule_step take float64"
        )
    if problem.chunk_size is None:
        return DEFAULT_CHUNK[problem.dtype.name]
    if problem.chunk_size not in CHUNKS:
        raise NotImplementedError(
            f"chunk_size = {problem.chunk_size}: CuPy arrays support 16, 32 and 64, or None"
        )
    return problem.chunk_size


# ---- shared memory, as the kernels carve it ------------------------------------------------------


def padded(size: int) -> int:
    return -(-size // 16) * 16


def pitch(columns: int, itemsize: int) -> int:
    return columns + 16 // itemsize


def carve(*arrays: tuple[int, int]) -> int:
    """Return the bytes of arrays (count, itemsize), each aligned to 16."""
    end = 0
    for count, itemsize in arrays:
        end = -(-end // 16) * 16 + count * itemsize
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
    """X and P for the walk, or with `factors` the public T, W and U."""
    size, K, V = problem.dtype.itemsize, padded(problem.K), padded(problem.V)
    inverse = 4 if problem.dtype.name == "float32" else 2
    square = (chunk * (chunk + 4), 4)
    triangle = (chunk * pitch(chunk, inverse), inverse)
    rows = (chunk * pitch(K, size), size)
    if factors:
        first = [rows, (chunk * pitch(V, size), size), (chunk * pitch(chunk, size), size)]
    else:
        first = [rows, rows, square]
    shared = carve(*first, square, square, triangle, triangle, triangle, (chunk, 4), (chunk, 4))
    fits("the WY factors", chunk, shared, facts)
    names = [None] * 5 if factors else ["x", "p", "G" if problem.g is not None else None]
    names = [None, None, None, "t", "w", "u"] if factors else [*names, None, None, None]
    return Launch(
        "wy_factors.cu",
        "wy_factors",
        variant(problem, chunk, WRITE_X=int(not factors), WRITE_WU=int(factors)),
        slots(problem, chunk) * problem.H if problem.T else 0,
        128,
        shared,
        (
            None if factors else "q",
            "k",
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


def walk_launch(
    problem: Problem,
    chunk: int,
    facts: DeviceFacts,
    *,
    factors: bool = False,
    zero_v: bool = False,
    states: str | None = None,
    output: str | None = "o",
    initial: str | None = "initial_state",
    final: str = "final_state",
) -> Launch:
    """The walk over the chunks. `states` is the C type of written states, or None."""
    size, K = problem.dtype.itemsize, padded(problem.K)
    V = problem.K if zero_v else problem.V
    row_tiles = 2 if K <= 128 and chunk <= 32 and size == 2 else 1
    rows = padded(V) // 16
    row_tiles = min(row_tiles, rows)
    sequences = problem.N * problem.HV
    # As many warps as share a block's keys, but rather more blocks than idle multiprocessors.
    warps = min(4, -(-rows // row_tiles))
    while warps > 1 and sequences * -(-rows // (row_tiles * warps)) < facts.sm_count:
        warps //= 2
    slice_ = 16 * row_tiles * warps
    square = (chunk * pitch(chunk, size), size)
    key_rows = (chunk * pitch(K, size), size)
    stage = [key_rows, key_rows, (chunk * pitch(slice_, size), size)]
    if not factors:
        stage += [square, square, (chunk, 4), (chunk, 4)]
    shared = carve(*stage, *stage)
    fits("the state pass", chunk, shared, facts)
    defines = variant(
        problem,
        chunk,
        HEAD_V=V,
        STATE_VK=int(problem.state_layout == "vk" and not zero_v),
        FROM_FACTORS=int(factors),
        ZERO_V=int(zero_v),
        WRITE_STATES=int(states is not None),
        STATES_DTYPE=states or "float",
        WARPS=warps,
        ROW_TILES=row_tiles,
    )
    return Launch(
        "forward.cu",
        "forward",
        defines,
        sequences * -(-padded(V) // slice_),
        32 * warps,
        shared,
        (
            "w" if factors else "q",
            "k",
            None if zero_v else ("u" if factors else "v"),
            None if factors else "x",
            None if factors else "p",
            None if factors else "beta",
            "G" if problem.g is not None else None,
            initial,
            "cu_seqlens",
            output,
            final,
            "states" if states else None,
            "v_new" if states else None,
            np.float32(problem.scale),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
        ),
    )


# ---- the operators -------------------------------------------------------------------------------


def plan_forward(problem: Problem, facts: DeviceFacts, residuals: bool = False) -> Plan:
    """Plan `chunk_delta_rule`, and with `residuals` what its gradients read."""
    chunk = chunk_of(problem)
    tokens = (problem.B, problem.T, problem.HV)
    outputs = {
        "o": ((*tokens, problem.V), problem.dtype),
        "final_state": (problem.state_shape, problem.state_dtype),
    }
    workspace = {name: ((*tokens, chunk), problem.dtype) for name in ("x", "p")}
    if problem.g is not None:
        workspace["G"] = (tokens, np.dtype(np.float32))
    states = None
    if residuals:
        states = C_TYPES[problem.dtype.name]
        shape = (problem.B, problem.chunk_slots(chunk), problem.HV, problem.K, problem.V)
        workspace["states"] = (shape, problem.dtype)
        workspace["v_new"] = ((*tokens, problem.V), problem.dtype)
    launches = (
        *norm_launches(problem),
        wy_factors_launch(problem, chunk, facts, factors=False),
        walk_launch(problem, chunk, facts, states=states),
    )
    return Plan(launches, outputs, workspace | norm_workspace(problem))


def plan_wy_factors(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `wy_factors`."""
    chunk = chunk_of(problem)
    tokens = (problem.B, problem.T, problem.HV)
    outputs = {
        name: ((*tokens, size), problem.dtype)
        for name, size in (("w", problem.K), ("u", problem.V), ("t", chunk))
    }
    return Plan((wy_factors_launch(problem, chunk, facts, factors=True),), outputs)


def plan_state_pass(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `state_pass`; unused chunk slots are zero, so its states are zeroed first."""
    chunk = chunk_of(problem)
    shape = (problem.B, problem.chunk_slots(chunk), problem.HV, problem.K, problem.V)
    outputs = {
        "states": (shape, problem.state_dtype),
        "v_new": ((problem.B, problem.T, problem.HV, problem.V), problem.dtype),
        "final_state": (problem.state_shape, problem.state_dtype),
    }
    walk = walk_launch(problem, chunk, facts, factors=True, states="float", output=None)
    return Plan((walk,), outputs)


def plan_transfer(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `sequence_transfer`: H from the zero state, P from the identity without values."""
    chunk = chunk_of(problem)
    tokens = (problem.B, problem.T, problem.HV)
    outputs = {
        "p": ((problem.N, problem.HV, problem.K, problem.K), problem.state_dtype),
        "h": ((problem.N, problem.HV, problem.K, problem.V), problem.state_dtype),
    }
    workspace = {name: ((*tokens, chunk), problem.dtype) for name in ("x", "p_pairs")}
    return Plan((), outputs, workspace)


# ---- normalised q and k --------------------------------------------------------------------------


def norm_launches(problem: Problem) -> tuple:
    return ()


def norm_workspace(problem: Problem) -> dict:
    return {}


def elements(shape) -> int:
    return prod(shape)
