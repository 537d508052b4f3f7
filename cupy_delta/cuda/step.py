"""The launch of a decoding step: how the threads of `decode.cu` share a state."""

from __future__ import annotations

import math

from ..problem import Problem
from .kernels import C_TYPES, Launch, i32

# Bytes of registers for a thread's part of a state, by layout and bytes per element of the state,
# and threads per block: the fastest of those measured on an H200, see docs/performance.md.
TILE_BYTES = {("kv", 4): 512, ("vk", 4): 128}
OTHER_TILE_BYTES = 256
THREADS = 128
VECTOR_BYTES = 16
SECTOR_BYTES = 32  # of a line of the caches: what an access to memory moves at least
WARP = 32


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()


def step_tile(problem: Problem) -> dict:
    """Return the macros of `decode.cu` that say which part of a state a thread has.

    A (V, K) state: PARTS threads side by side have a row of keys, and several rows. A (K, V) state:
    a thread has one vector of some keys, ACROSS threads are side by side, and PARTS share the keys.
    """
    K, V, itemsize = problem.K, problem.V, problem.state.dtype.itemsize
    tile = TILE_BYTES.get((problem.state_layout, itemsize), OTHER_TILE_BYTES)
    tile //= problem.compute_dtype.itemsize
    if problem.state_layout == "vk":
        vector = math.gcd(K, VECTOR_BYTES // itemsize)
        parts = min(WARP, power_of_two(K // vector))
        keys = -(-K // (parts * vector)) * vector
        values, across = min(parts, tile // keys, power_of_two(V)), 1
    else:
        values = vector = math.gcd(V, VECTOR_BYTES // itemsize)
        widest = min(WARP, power_of_two(V // vector))
        across = min(widest, WARP // values, -(-SECTOR_BYTES // (vector * itemsize)))
        parts = max(values, min(WARP // across, power_of_two(-(-K * values // tile))))
        across = min(widest, WARP // parts)
        parts = max(parts, min(WARP // across, power_of_two(K)))
    per_warp = WARP // parts * values
    channels = min(max(per_warp, THREADS // parts * values), -(-V // per_warp) * per_warp)
    return dict(VECTOR=vector, VALUES=values, PARTS=parts, ACROSS=across, CHANNELS=channels)


def step_launch(problem: Problem) -> Launch:
    """The new tokens of all sequences, on the slots of a pool, in place."""
    real = problem.compute_dtype
    tile = step_tile(problem)
    defines = dict(
        DTYPE=C_TYPES[problem.dtype.name],
        STATE_DTYPE=C_TYPES[problem.state.dtype.name],
        HEAD_K=problem.K,
        HEAD_V=problem.V,
        HAS_GATE=int(problem.g is not None),
        STATE_VK=int(problem.state_layout == "vk"),
        L2NORM=int(problem.qk_l2norm),
    )
    return Launch(
        "decode.cu",
        "decode",
        tuple((defines | tile).items()),
        problem.N * problem.HV * -(-problem.V // tile["CHANNELS"]) if problem.T else 0,
        tile["CHANNELS"] // tile["VALUES"] * tile["PARTS"],
        0,
        (
            "q",
            "k",
            "v",
            "beta",
            "g",
            "state_indices",
            "state",
            "o",
            real.type(problem.scale),
            i32(problem.T),
            i32(problem.H),
            i32(problem.HV),
            i32(problem.state.shape[0]),
        ),
    )
