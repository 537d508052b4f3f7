"""A decoding step, and how threads share a state: `tokens/decode.cu`."""

from __future__ import annotations

import math

import numpy as np

from ...call import Call
from ..spec import C_TYPES, GATES, DeviceFacts, Launch, Plan, i32

# The fastest of those measured (docs/performance.md). Bytes of a thread's part of a state in the
# type of its sums, and for (K, V) by bytes per element of the state.
TILE_BYTES, KV_TILE_BYTES = 128, {4: 256}
# Bytes of a row of a (K, V) state that a warp takes, likewise.
PIECE_BYTES, KV_PIECE_BYTES = 64, {2: 128, 4: 256}
# Threads per block of warps that share nothing.
THREADS = 128
WARP, MOST_WARPS = 32, 16


def plan_step(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `delta_rule_step`."""
    outputs = {"o": (call.value_shape, call.dtype)}
    return Plan((decode_launch(call),), outputs, sums=call.compute_dtype)


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()


def pool_dtype(call: Call) -> np.dtype:
    """Return the dtype of the pool, which every step has."""
    assert call.pool_dtype is not None
    return call.pool_dtype


def step_tile(call: Call) -> dict:
    """Return the macros of `tokens/decode.cu` that say which part of a state a thread has.

    A (V, K) state: PARTS threads side by side have a row of keys, and several rows. A (K, V) state:
    a thread has one vector of some keys, ACROSS threads are side by side, and the PARTS others of
    its warp share the keys; with more keys than their tiles hold, WARPS of a block share them.
    """
    K, V, itemsize = call.K, call.V, pool_dtype(call).itemsize
    longest = call.pool_alignment // itemsize
    if call.state_layout == "vk":
        vector = math.gcd(K, longest)
        parts = min(WARP, power_of_two(K // vector))
        keys = -(-K // (parts * vector)) * vector
        tile = TILE_BYTES // call.compute_dtype.itemsize
        fitting = 1 << (max(1, tile // keys).bit_length() - 1)
        values, across, warps = min(parts, fitting, power_of_two(V)), 1, 1
        per_warp = WARP // parts * values
    else:
        values = vector = math.gcd(V, longest)
        widest = min(WARP, power_of_two(V // vector))
        piece = KV_PIECE_BYTES.get(itemsize, PIECE_BYTES) // itemsize
        across = min(widest, max(1, piece // vector))
        parts = WARP // across
        per_warp = across * values
        tile = KV_TILE_BYTES.get(itemsize, TILE_BYTES) // call.compute_dtype.itemsize
        enough = max(-(-K * values // (tile * parts)), -(-per_warp // WARP))
        warps = min(MOST_WARPS, power_of_two(enough))
    alone = min(THREADS // WARP, -(-V // per_warp)) if warps == 1 else 1
    return dict(
        VECTOR=vector,
        VALUES=values,
        PARTS=parts,
        WARPS=warps,
        ACROSS=across,
        CHANNELS=per_warp * alone,
    )


def decode_launch(call: Call) -> Launch:
    """The new tokens of all sequences, on the slots of a pool, in place."""
    real = call.compute_dtype
    tile = step_tile(call)
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        STATE_DTYPE=C_TYPES[pool_dtype(call).name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        GROUP=call.groups,
        HAS_GATE=GATES.index(call.gate),
        VARLEN=int(call.varlen),
        STATE_VK=int(call.state_layout == "vk"),
        L2NORM=int(call.qk_l2norm),
        ONE_TOKEN=int(call.T == 1 and not call.varlen and not call.accepting),
    )
    # As its Passed: per warp two sums of each channel and three more, and what is written.
    passed = (2 * tile["WARPS"] + 1) * tile["CHANNELS"] + 3 * tile["WARPS"]
    shared = passed * real.itemsize if tile["WARPS"] > 1 else 0
    threads = tile["CHANNELS"] // tile["VALUES"] * tile["PARTS"] * tile["WARPS"]
    return Launch(
        "tokens/decode.cu",
        "decode",
        tuple((defines | tile).items()),
        call.N * call.HV * -(-call.V // tile["CHANNELS"]),
        threads,
        shared,
        (
            "q",
            "k",
            "v",
            "beta",
            "g",
            "cu_seqlens",
            "state_indices",
            "output_state_indices",
            "accepted",
            "state",
            "o",
            real.type(call.scale),
            i32(call.T),
            i32(call.HV),
            i32(call.pool_slots),
            np.int64(call.pool_stride),
        ),
    )
