"""A decoding step, and how threads share a state: `tokens/decode.cu`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...call import Call
from ..spec import C_TYPES, GATES, Argument, Launch, carve, i32
from .raw import raw_macros

# Threads per block of warps that share nothing: as a rule, and of one token that comes with logits.
THREADS, RAW_THREADS = 128, 64
WARP, MOST_WARPS = 32, 16
# New tokens that a block brings to shared memory at a time.
BATCH = 4
# So few states that all their blocks are there at once. With one token of few (K, V) states a
# thread has half as many value channels, in more blocks. Only where the order of sums, and so every
# bit, is the same.
FEW_STATES = 128
# Warps of a multiprocessor, at least, for which registers are spared with one token that is early,
# and with several.
EARLY_TOGETHER, TOGETHER = {"vk": 28, "kv": 16}, {"vk": 20, "kv": 16}
PACKED_TOGETHER = 20
# States that blocks ask the L2 cache for before their own blocks do have so many bytes, which no
# cache is too small for: 132 states of 128 x 128 in bfloat16, the best of those timed (docs/lab).
AHEAD_BYTES = 132 * 128 * 128 * 2


class Tiling(NamedTuple):
    """What a thread has of a state, and a warp of its rows."""

    vk: int  # bytes in the type of the sums, of a (V, K) state, at most
    kv: int  # of a (K, V) state
    row: int  # bytes that a warp has of a row of a (K, V) state
    keys: int = 1  # of a row of a (V, K) state, at least, if there are as many
    vector: int = 16  # bytes of an access to a (K, V) state, at most


# By bytes of an element, the fastest of those measured (docs/lab). States that every call rounds to
# 16 bits need not have the same bits after several tokens as after one at a time: in steps of
# several tokens threads have more of them, so that fewer sums are passed.
TILINGS = {2: Tiling(vk=128, kv=128, row=128), 4: Tiling(128, 256, 256), 8: Tiling(128, 128, 64)}
SEVERAL_IN_16_BITS = Tiling(vk=256, kv=256, row=128, keys=16, vector=8)


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


def own_rows(call: Call) -> bool:
    """Return whether threads read rows of q and k for themselves, one of each.

    Where gates of key channels are to be formed of logits it would be slower (H200), as it is of
    logits with (V, K) states of more than 16 bits.
    """
    raw_channels = call.gate == "channel" and call.raw_gate is not None
    return one_token(call) and not raw_channels and (ordered(call) or not of_logits(call))


def of_logits(call: Call) -> bool:
    """Return whether gates or strengths are formed of logits."""
    return call.raw_gate is not None or call.raw_beta is not None


def ordered(call: Call) -> bool:
    """Return whether loads stand in the order that they are written in, which no bit depends on.

    One token is faster with it but with (V, K) states of more than 16 bits, several only of arrays
    that are all accepted, of which states have more than 16 bits, or in (K, V) (H200).
    """
    wide, vk = pool_dtype(call).itemsize > 2, call.state_layout == "vk"
    if one_token(call):
        return not (wide and vk)
    return wide and not (vk and (of_logits(call) or call.accepting))


def few(call: Call) -> bool:
    """Return whether there are so few states that all blocks are there at once."""
    return call.N * call.HV <= FEW_STATES


def rows_first(call: Call) -> bool:
    """Return whether a block asks for rows of tokens before it asks for the state.

    With one token of more than a few (V, K) states in 16 bits it is slower (H200).
    """
    in_16_bits = pool_dtype(call).itemsize == 2
    if not (one_token(call) and in_16_bits and call.state_layout == "vk"):
        return True
    return call.gate == "channel" or few(call)


def early(call: Call) -> bool:
    """Return whether one token makes what needs no state while the state is on its way.

    Of more than a few states with more than 16 bits it is slower (H200), and of those whose rows
    lie in shared memory.
    """
    in_16_bits = pool_dtype(call).itemsize == 2
    return one_token(call) and (in_16_bits or (few(call) and own_rows(call)))


def streamed(call: Call) -> bool:
    """Return whether caches keep anything else rather than states that are read and written.

    With one token of states in 16 bits it is faster, with others slower (H200).
    """
    return pool_dtype(call).itemsize == 2 and one_token(call)


def packed(call: Call) -> bool:
    """Return whether one token unpacks its state again for what it stores, in fewer registers.

    Of more than a few (K, V) states in pairs of 16 bits. Gates per channel would spill with a block
    of a multiprocessor more.
    """
    pairs = pool_dtype(call).itemsize == 2 and step_tile(call)["VECTOR"] > 1
    spared = pairs and call.state_layout == "kv" and call.gate != "channel"
    return spared and early(call) and own_rows(call) and not few(call)


def blocks_together(call: Call, threads: int) -> int:
    """Return for how many blocks of a multiprocessor, at least, registers are spared, or 1.

    With one token that is early, where threads have its rows, and with several in float32, but for
    gates per channel in (K, V), which would spill. Where loads are not in order the compiler
    decides, for which the number is 0.
    """
    layout, one = call.state_layout, one_token(call)
    spared = early(call) and own_rows(call) if one else layout == "vk" or call.gate != "channel"
    if not ordered(call):
        return 0
    if call.compute_dtype.itemsize != 4 or not spared:
        return 1
    warps = PACKED_TOGETHER if packed(call) else (EARLY_TOGETHER if one else TOGETHER)[layout]
    return warps * WARP // threads


def states_ahead(call: Call) -> int:
    """Return how many states lie between a block's own and the one that it asks ahead for, or 0.

    Verifying is slower with it, of which memory is half as busy, and so are few states, and (V, K)
    states in 16 bits with a gate per channel (H200).
    """
    itemsize = pool_dtype(call).itemsize
    slower = itemsize == 2 and call.state_layout == "vk" and call.gate == "channel"
    ahead = max(1, AHEAD_BYTES // (call.K * call.V * itemsize))
    if call.accepting or slower or few(call) or ahead >= call.N * call.HV:
        return 0
    return ahead


def step_tile(call: Call) -> dict:
    """Return the macros of `tokens/decode.cu` that say which part of a state a thread has.

    A (V, K) state: PARTS threads side by side have a row of keys, and several rows. A (K, V) state:
    a thread has one vector of some keys, BESIDE threads are side by side, and the PARTS others of
    its warp share the keys; with more keys than their tiles hold, WARPS of a block share them.
    """
    K, V, itemsize = call.K, call.V, pool_dtype(call).itemsize
    several = itemsize == 2 and not (own_rows(call) and call.state_layout == "vk")
    tiling = SEVERAL_IN_16_BITS if several else TILINGS[itemsize]
    if call.state_layout == "vk":
        vector = math.gcd(K, call.pool_alignment // itemsize)
        parts = min(WARP, power_of_two(-(-K // max(vector, tiling.keys))))
        keys = -(-K // (parts * vector)) * vector
        tile = tiling.vk // call.compute_dtype.itemsize
        fitting = 1 << (max(1, tile // keys).bit_length() - 1)
        values, across, warps = min(parts, fitting, power_of_two(V)), 1, 1
        per_warp = WARP // parts * values
    else:
        values = vector = math.gcd(V, min(call.pool_alignment, tiling.vector) // itemsize)
        widest = min(WARP, power_of_two(V // vector))
        across = min(widest, max(1, tiling.row // itemsize // vector))
        parts = WARP // across
        per_warp = across * values
        tile = tiling.kv // call.compute_dtype.itemsize
        enough = max(-(-K * values // (tile * parts)), -(-per_warp // WARP))
        warps = min(MOST_WARPS, power_of_two(enough))
        if one_token(call) and few(call) and values >= 2 * parts:
            values = vector = values // 2
            per_warp = across * values
    threads = RAW_THREADS if one_token(call) and not own_rows(call) else THREADS
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
    """Return the shared memory of a block: Tokens if rows are there, and what is passed."""
    real, warps = call.compute_dtype.itemsize, tile["WARPS"]
    passed = (2 * warps + 1) * tile["CHANNELS"] if warps > 1 else 0
    if own_rows(call):
        return (passed + 3 * warps) * real if warps > 1 else 0
    run = tile["VECTOR"] if call.state_layout == "vk" else 1
    sharers = tile["PARTS"] * warps
    row = -(-call.K // (sharers * run)) * run * sharers
    rows = 4 if call.gate == "channel" else 2
    tokens = batch * (5 + rows * row + tile["CHANNELS"])
    return carve((-(-tokens // 4) * 4, real), (passed, real))


def step_macros(call: Call) -> dict:
    """Return the macros of every kernel that decodes."""
    real, raw_gate, raw_beta = call.compute_dtype, call.raw_gate, call.raw_beta
    return dict(
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
        **raw_macros(raw_gate),
        RAW_BETA=int(raw_beta is not None),
        GATE_DTYPE=C_TYPES[(real if raw_gate is None else raw_gate.dtype).name],
        BETA_DTYPE=C_TYPES[(real if raw_beta is None else raw_beta.dtype).name],
    )


def token_arguments(call: Call) -> tuple[Argument, ...]:
    """Return the tokens that every kernel that decodes is given."""
    beta, g = "logits" if call.raw_beta else "beta", "a" if call.raw_gate else "g"
    return ("q", "k", "v", beta, g)


# Which slots states come from and go to, and results.
POOL_ARGUMENTS: tuple[Argument, ...] = (
    "state_indices",
    "output_state_indices",
    "accepted",
    "state",
    "o",
)


def size_arguments(call: Call) -> tuple[Argument, ...]:
    """Return the sizes that every kernel that decodes is given last, around its raw arguments."""
    sizes = i32(call.HV), np.uint32((2**32 - 1) // call.HV), i32(call.pool_slots)
    return (*sizes, *raw_arguments(call), np.int64(call.pool_stride))


def raw_arguments(call: Call) -> tuple[Argument, ...]:
    """Return what gates and strengths are formed of, where they are."""
    real, raw_gate, raw_beta = call.compute_dtype, call.raw_gate, call.raw_beta
    if raw_gate is None and raw_beta is None:
        return ()
    return (
        None if raw_gate is None else "A_log",
        "dt_bias" if raw_gate is not None and raw_gate.bias else None,
        real.type(0 if raw_gate is None else raw_gate.bound),
        real.type(1 if raw_beta is None else raw_beta.scale),
    )


def decode_launch(call: Call) -> Launch:
    """The new tokens of all sequences, on the slots of a pool, in place."""
    tile, batch = step_tile(call), 1 if one_token(call) else BATCH
    rows = dict(OWN_ROWS=int(own_rows(call)), ROWS_FIRST=int(rows_first(call)), BATCH=batch)
    loads = dict(ORDERED=int(ordered(call)), EARLY=int(early(call)), STREAMED=int(streamed(call)))
    loads |= dict(PACKED=int(packed(call)))
    block = tile["CHANNELS"] // tile["VALUES"] * tile["PARTS"] * tile["WARPS"]
    hints = dict(BLOCKS=blocks_together(call, block), AHEAD=states_ahead(call))
    defines = step_macros(call) | rows | loads | tile | hints
    return Launch(
        "tokens/decode.cu",
        "decode",
        tuple(defines.items()),
        call.N * call.HV * -(-call.V // tile["CHANNELS"]),
        block,
        shared_bytes(call, tile, batch),
        (
            *token_arguments(call),
            "cu_seqlens",
            *POOL_ARGUMENTS,
            call.compute_dtype.type(call.scale),
            i32(call.T),
            *size_arguments(call),
        ),
    )
