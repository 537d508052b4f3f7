"""The launches of `tokens/`: the walk by tokens, the norm of q and k, and P X + H."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, i32

# Of the walk by tokens: threads per block, and key channels per thread.
TOKEN_THREADS = 128
TOKEN_KEYS = 32


def token_launch(call: Call) -> Launch:
    """The walk token by token."""
    real = call.compute_dtype
    # Threads that share a value channel's keys, up to TOKEN_KEYS each; value channels per block.
    parts = 1
    while parts * TOKEN_KEYS < call.K:
        parts *= 2
    per_warp = 32 // parts
    channels = min(TOKEN_THREADS // parts, -(-call.V // per_warp) * per_warp)
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        HAS_GATE=int(call.gate is not None),
        VARLEN=int(call.varlen),
        STATE_VK=int(call.state_layout == "vk"),
        L2NORM=int(call.qk_l2norm),
        BETA_PER_VALUE=int(call.beta_per_value),
        PARTS=parts,
        CHANNELS=channels,
    )
    return Launch(
        "tokens/recurrent.cu",
        "recurrent",
        tuple(defines.items()),
        call.N * call.HV * -(-call.V // channels),
        channels * parts,
        4 * call.K * real.itemsize,
        (
            "q",
            "k",
            "v",
            "beta",
            "g",
            "initial_state",
            "cu_seqlens",
            "o",
            "final_state",
            real.type(call.scale),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )


def norm_launch(call: Call, name: str, rows: str, backward: bool = False) -> Launch:
    """q or k normalised into `rows`; or the gradient in `rows` carried back through the norm."""
    count = call.B * call.T * call.H
    defines = dict(DTYPE=C_TYPES[call.dtype.name], HEAD_K=call.K, BACKWARD=int(backward))
    arguments = (name, rows, np.int64(count))
    return Launch(
        "tokens/l2norm.cu", "l2norm", tuple(defines.items()), -(-count // 8), 256, 0, arguments
    )


def affine_launch(shape: tuple, columns: int, dtype, add: bool) -> Launch:
    """P X, or with `add` P X + H, for stacks (N, HV, K, .)."""
    N, HV, K = shape
    defines = dict(REAL=C_TYPES[dtype.name], ADD=int(add))
    count = N * HV * K * columns
    arguments = ("p", "x", "h", "y", np.int64(count), i32(K), i32(columns))
    return Launch(
        "tokens/affine.cu", "affine", tuple(defines.items()), -(-count // 256), 256, 0, arguments
    )
