"""A step of few tokens on states of bfloat16: `tokens/decode_products.cu`."""

from __future__ import annotations

import math

from ...call import POOL_ALIGNMENT, Call
from ..spec import Launch, padded
from .decode import (
    POOL_ARGUMENTS,
    few,
    pool_dtype,
    size_arguments,
    states_ahead,
    step_macros,
    token_arguments,
)

# Tokens of a sequence, at most: rows of k and q are the columns of one product.
MOST_TOKENS = 4
# Keys that a lane takes at once with its neighbours, and value channels of a product.
KEYS, ROWS = 32, 16
# Warps of a block with (V, K) states, at most, and tiles of a warp with (K, V) ones; of few states
# fewer, in more blocks. The order of sums, and so every bit, is the same.
WARPS, TILES = 4, 4
FEW_TILES = 2
# Warps of a multiprocessor, at least, for which registers are spared, each with 4 KB on the way.
# Best of 4 to 28 on an H200.
TOGETHER = 20
# Loads stand in the order that they are written in, and caches keep anything rather than states.
LOADS = dict(ORDERED=1, STREAMED=1)


def fit_products(call: Call) -> bool:
    """Return whether arrays and states are bfloat16 in sizes of whole fragments."""
    bfloat16 = call.dtype.name == pool_dtype(call).name == "bfloat16"
    few = call.T <= MOST_TOKENS and not call.varlen
    whole = call.K % KEYS == 0 and call.V % ROWS == 0 and call.pool_alignment == POOL_ALIGNMENT
    return bfloat16 and few and whole


def products_are_faster(call: Call) -> bool:
    """Return whether they are faster than `tokens/decode.cu`, as measured on an H200.

    With several tokens they are, by a quarter and more; with one they are not. The number of
    sequences does not enter: a sequence has the same bits in every batch.
    """
    return call.T > 1


def products_tile(call: Call) -> dict:
    """Return the macros that say which part of a state a warp has."""
    if call.state_layout == "vk":
        tiles, warps = 1, math.gcd(call.V // ROWS, WARPS)
    else:
        most = FEW_TILES if few(call) else TILES
        tiles, warps = math.gcd(call.V // ROWS, most), call.K // KEYS
    return dict(TILES=tiles, WARPS=warps, BLOCKS=TOGETHER // warps)


def products_shared_bytes(call: Call, tiles: int, warps: int) -> int:
    """Return the shared memory of a block: rows of gates per channel, and what warps pass."""
    passed = 0 if call.state_layout == "vk" or warps == 1 else 32 * tiles * (16 * warps + 8)
    if call.gate != "channel":
        return passed
    pieces, sums = 2 * 3 * call.T * (call.K + 32), warps * call.T * (call.T + 2)
    return passed + padded(2 * pieces + 4 * (call.K + sums))


def decode_products_launch(call: Call) -> Launch:
    """The new tokens of all sequences, on the slots of a pool, in place."""
    # Gates per channel are slower with it.
    macros = products_tile(call) | dict(AHEAD=0 if call.gate == "channel" else states_ahead(call))
    tiles, warps = macros["TILES"], macros["WARPS"]
    channels = ROWS * tiles * (warps if call.state_layout == "vk" else 1)
    return Launch(
        "tokens/decode_products.cu",
        "decode_products",
        tuple((step_macros(call) | dict(TOKENS=call.T) | LOADS | macros).items()),
        call.N * call.HV * (call.V // channels),
        32 * warps,
        products_shared_bytes(call, tiles, warps),
        (
            *token_arguments(call),
            *POOL_ARGUMENTS,
            call.compute_dtype.type(call.scale),
            *size_arguments(call),
        ),
    )
