"""A decoding step, and how threads share a state: `tokens/decode.cu`."""

from __future__ import annotations

import math

import numpy as np

from ...call import Call
from ..spec import C_TYPES, GATES, DeviceFacts, Launch, Plan, carve, i32
from .raw import raw_macros

# The fastest of a few on an H200, with the kernel as it was before beta and gates per head came by
# a warp of their own. What a thread has of a state: the most elements, half as many in double, and
# by how many keys, if there are as many; less of (V, K) states that are wider than 16 bits.
TILE, KEYS, WIDE_TILE, WIDE_KEYS = 64, 16, 32, 8
# Neighbouring threads that take neighbouring vectors of a row of a (K, V) state, and their length.
BESIDE, VECTOR = 16, 4
# Threads per block of warps that share nothing: with one token, and with several.
ONE_THREADS, THREADS = 64, 128
WARP, MOST_WARPS = 32, 16
# New tokens that a block brings to shared memory at a time.
BATCH = 4


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


def one_token(call: Call) -> bool:
    """Return whether every sequence has one new token, which its state takes up."""
    return call.T == 1 and not call.varlen and not call.accepting


def step_tile(call: Call) -> dict:
    """Return the macros of `tokens/decode.cu` that say which part of a state a thread has.

    A (V, K) state: PARTS threads side by side have a row of keys, and several rows. A (K, V) state:
    a thread has one vector of some keys, BESIDE threads are side by side, and the PARTS others of
    its warp share the keys; with more keys than their tiles hold, WARPS of a block share them.
    """
    K, V = call.K, call.V
    longest = call.pool_alignment // pool_dtype(call).itemsize
    tile, most_keys, itemsize = TILE, KEYS, pool_dtype(call).itemsize
    if call.state_layout == "vk" and itemsize > 2:
        tile, most_keys = WIDE_TILE, WIDE_KEYS
    tile = tile * 4 // call.compute_dtype.itemsize
    if call.state_layout == "vk":
        vector = math.gcd(K, longest)
        parts = min(WARP, power_of_two(-(-K // max(vector, most_keys))))
        keys = -(-K // (parts * vector)) * vector
        fitting = 1 << (max(1, tile // keys).bit_length() - 1)
        values, across, warps = min(parts, fitting, power_of_two(V)), 1, 1
        per_warp = WARP // parts * values
    else:
        values = vector = math.gcd(V, min(longest, VECTOR))
        across = min(BESIDE, power_of_two(V // vector))
        parts = WARP // across
        per_warp = across * values
        enough = max(-(-K * values // (tile * parts)), -(-per_warp // WARP))
        warps = min(MOST_WARPS, power_of_two(enough))
    threads = ONE_THREADS if one_token(call) else THREADS
    alone = min(threads // WARP, -(-V // per_warp)) if warps == 1 else 1
    return dict(
        VECTOR=vector,
        VALUES=values,
        PARTS=parts,
        WARPS=warps,
        BESIDE=across,
        CHANNELS=per_warp * alone,
    )


def shared_bytes(call: Call, tile: dict, batch: int) -> int:
    """Return the shared memory of a block: the kernel's Tokens, and Passed if warps share keys."""
    sharers = tile["PARTS"] * tile["WARPS"]
    run = tile["VECTOR"] if call.state_layout == "vk" else 1
    row = -(-call.K // (sharers * run)) * run * sharers
    rows = 4 if call.gate == "channel" else 2
    real = call.compute_dtype.itemsize
    tokens = batch * (4 + rows * row + tile["CHANNELS"])
    taken = [(-(-tokens // 4) * 4, real)]
    if tile["WARPS"] > 1:
        taken.append(((2 * tile["WARPS"] + 1) * tile["CHANNELS"], real))
    return carve(*taken)


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
        ONE_TOKEN=int(one_token(call)),
    )
    raw_gate, raw_beta = call.raw_gate, call.raw_beta
    defines |= raw_macros(raw_gate) | dict(
        RAW_BETA=int(raw_beta is not None),
        GATE_DTYPE=C_TYPES[(real if raw_gate is None else raw_gate.dtype).name],
        BETA_DTYPE=C_TYPES[(real if raw_beta is None else raw_beta.dtype).name],
    )
    batch = 1 if defines["ONE_TOKEN"] else BATCH
    defines["BATCH"] = batch
    threads = tile["CHANNELS"] // tile["VALUES"] * tile["PARTS"] * tile["WARPS"]
    return Launch(
        "tokens/decode.cu",
        "decode",
        tuple((defines | tile).items()),
        call.N * call.HV * -(-call.V // tile["CHANNELS"]),
        threads,
        shared_bytes(call, tile, batch),
        (
            "q",
            "k",
            "v",
            "beta" if raw_beta is None else "logits",
            "g" if raw_gate is None else "a",
            None if raw_gate is None else "A_log",
            "dt_bias" if raw_gate is not None and raw_gate.bias else None,
            "cu_seqlens",
            "state_indices",
            "output_state_indices",
            "accepted",
            "state",
            "o",
            real.type(call.scale),
            real.type(0 if raw_gate is None else raw_gate.bound),
            real.type(1 if raw_beta is None else raw_beta.scale),
            i32(call.T),
            i32(call.HV),
            i32(call.pool_slots),
            np.int64(call.pool_stride),
        ),
    )
