"""q and k normalised, and their gradients carried back through that: `tokens/l2norm.cu`."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, normal


def l2norm_launch(call: Call, name: str, rows: str, backward: bool = False) -> Launch:
    """q or k normalised into `rows`; or the gradient in `rows` carried back through the norm."""
    count = call.B * call.T * call.H
    defines = dict(DTYPE=C_TYPES[call.dtype.name], HEAD_K=call.K, BACKWARD=int(backward))
    arguments = (name, rows, np.int64(count))
    return Launch(
        "tokens/l2norm.cu", "l2norm", tuple(defines.items()), -(-count // 8), 256, 0, arguments
    )


def normalised(call: Call, *names: str) -> tuple[list[Launch], dict]:
    """Return the launches that normalise q and k if they are to be, and the arrays for that."""
    if not call.qk_l2norm:
        return [], {}
    launches = [l2norm_launch(call, name, normal(call, name)) for name in names]
    return launches, {normal(call, name): (call.key_shape, call.dtype) for name in names}


def through_norm(call: Call) -> list[Launch]:
    """Return the launches that carry the gradients of q and k back through the norm, if any."""
    if not call.qk_l2norm:
        return []
    return [l2norm_launch(call, name, f"d{name}", backward=True) for name in ("q", "k")]
