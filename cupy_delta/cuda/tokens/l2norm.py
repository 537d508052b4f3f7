"""q and k normalised, and their gradients carried back through that: `tokens/l2norm.cu`."""

from __future__ import annotations

import math

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, normal

THREADS, ROWS = 256, 2  # of a block, of a thread


def rows_of_block(K: int, itemsize: int) -> int:
    """Return how many rows a block takes, whose lanes have 16 bytes of one at most."""
    vectors = K // math.gcd(K, 16 // itemsize)
    lanes = min(32, 1 << (vectors - 1).bit_length())
    return THREADS // lanes * ROWS


def l2norm_launch(call: Call, pairs: list[tuple[str, str]], backward: bool = False) -> Launch:
    """q or k, or both, normalised into the second of a pair; or the gradient there carried back."""
    rows = call.B * call.T * call.H
    blocks = -(-rows // rows_of_block(call.K, call.dtype.itemsize))
    defines = dict(DTYPE=C_TYPES[call.dtype.name], HEAD_K=call.K, BACKWARD=int(backward))
    second = pairs[1] if len(pairs) == 2 else (None, None)
    return Launch(
        "tokens/l2norm.cu",
        "l2norm",
        tuple(defines.items()),
        blocks * len(pairs),
        THREADS,
        0,
        (*pairs[0], *second, np.int64(rows)),
    )


def normalised(call: Call, *names: str) -> tuple[list[Launch], dict]:
    """Return the launch that normalises q and k if they are to be, and the arrays for that."""
    if not call.qk_l2norm:
        return [], {}
    launch = l2norm_launch(call, [(name, normal(call, name)) for name in names])
    return [launch], {normal(call, name): (call.key_shape, call.dtype) for name in names}


def through_norm(call: Call) -> list[Launch]:
    """Return the launch that carries the gradients of q and k back through the norm, if any."""
    if not call.qk_l2norm:
        return []
    return [l2norm_launch(call, [(name, f"d{name}") for name in ("q", "k")], backward=True)]
