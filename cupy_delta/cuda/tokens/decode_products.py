"""A step of few tokens on states of bfloat16: `tokens/decode_products.cu`."""

from __future__ import annotations

import math

from ...call import POOL_ALIGNMENT, Call
from ..spec import Launch, padded
from .decode import (
    POOL_ARGUMENTS,
    one_token,
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
FEW_STATES, FEW_TILES = 128, 2
# Warps of a multiprocessor, at least, for which registers are spared, each with 4 KB on the way: as
# a rule, and of one token without sums over rows in shared memory. Best of 4 to 28 on an H200.
TOGETHER, TOGETHER_ONE = 20, 24


def fit_products(call: Call) -> bool:
    """Return whether arrays and states are bfloat16 in sizes of whole fragments."""
    bfloat16 = call.dtype.name == pool_dtype(call).name == "bfloat16"
    few = call.T <= MOST_TOKENS and not call.varlen
    whole = call.K % KEYS == 0 and call.V % ROWS == 0 and call.pool_alignment == POOL_ALIGNMENT
    return bfloat16 and few and whole


def products_are_faster(call: Call) -> bool:
    """Return whether they are faster than `tokens/decode.cu`, as measured on an H200.

    With several tokens they are, by a quarter and more. With one they are by 7 to 10 % where the
    state is (K, V) and g and beta are arrays or gates per channel, and elsewhere they are not.
    The number of sequences does not enter: a sequence has the same bits in every batch.
    """
    if call.T > 1:
        return True
    of_arrays = call.raw_gate is None and call.raw_beta is None
    return one_token(call) and call.state_layout == "kv" and (of_arrays or call.gate == "channel")


def products_tile(call: Call) -> dict:
    """Return the macros that say which part of a state a warp has."""
    if call.state_layout == "vk":
        tiles, warps = 1, math.gcd(call.V // ROWS, WARPS)
    else:
        most = FEW_TILES if call.N * call.HV <= FEW_STATES else TILES
        tiles, warps = math.gcd(call.V // ROWS, most), call.K // KEYS
    together = TOGETHER_ONE if call.T == 1 and call.gate != "channel" else TOGETHER
    return dict(TILES=tiles, WARPS=warps, BLOCKS=together // warps)


def products_shared_bytes(call: Call, tiles: int, warps: int) -> int:
    """Return the shared memory of a block: rows of gates per channel, and what warps pass."""
    passed = 0 if call.state_layout == "vk" or warps == 1 else 32 * tiles * (16 * warps + 8)
    if call.gate != "channel":
        return passed
    pieces, sums = 2 * 3 * call.T * (call.K + 32), warps * call.T * (call.T + 2)
    return passed + padded(2 * pieces + 4 * (call.K + sums))


def decode_products_launch(call: Call) -> Launch:
    """The new tokens of all sequences, on the slots of a pool, in place."""
    # Only with one token are there states to wait for; more have products to wait for.
    ahead = states_ahead(call) if call.T == 1 else 0
    macros = products_tile(call) | dict(AHEAD=ahead)
    tiles, warps = macros["TILES"], macros["WARPS"]
    channels = ROWS * tiles * (warps if call.state_layout == "vk" else 1)
    return Launch(
        "tokens/decode_products.cu",
        "decode_products",
        tuple((step_macros(call) | dict(TOKENS=call.T) | macros).items()),
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
