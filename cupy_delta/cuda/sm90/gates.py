"""What gates do in a chunk, made for the walks of compute capability 9.0 before they begin."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ...raw import RawBeta, RawGate
from ..spec import C_TYPES, SUMS, Launch, i32, raw_macros, slots
from .tiles import CHUNK, FACTOR_HEADS

WARPS = 4  # per block


def token_factors_launch(
    call: Call, raw_gate: RawGate | None = None, raw_beta: RawBeta | None = None
) -> Launch:
    """The records of all chunks and value heads at once, which walks with a gate read.

    Of g and beta, or where these are raw of their logits.
    """
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        CHUNK=CHUNK,
        HAS_GATE=1,
        VARLEN=int(call.varlen),
        G_DTYPE=C_TYPES[(raw_gate.dtype if raw_gate else SUMS).name],
        BETA_DTYPE=C_TYPES[(raw_beta.dtype if raw_beta else SUMS).name],
        RAW_BETA=int(raw_beta is not None),
        **raw_macros(raw_gate),
    )
    return Launch(
        "sm90/gates.cu",
        "token_factors",
        tuple(defines.items()),
        -(-slots(call, CHUNK) * -(-call.HV // FACTOR_HEADS) // WARPS),
        32 * WARPS,
        0,
        (
            "logits" if raw_beta else "beta",
            "a" if raw_gate else "g",
            "A_log" if raw_gate else None,
            "dt_bias" if raw_gate and raw_gate.bias else None,
            "cu_seqlens",
            "token_factors",
            "paired_heads",
            np.float32(call.scale),
            np.float32(raw_gate.bound if raw_gate else 0),
            np.float32(raw_beta.scale if raw_beta else 0),
            i32(slots(call, CHUNK)),
            i32(call.N),
            i32(call.T),
            i32(call.HV),
        ),
        arch="sm_90a",
    )
