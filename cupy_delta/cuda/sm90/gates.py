"""What gates do in a chunk, made for the walks of compute capability 9.0 before they begin."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, i32, slots
from .tiles import CHUNK

HEADS = 8  # value heads per block


def token_factors_launch(call: Call) -> Launch:
    """The records of all chunks and value heads at once, which walks with a gate read."""
    dtype = C_TYPES[call.dtype.name]
    defines = dict(DTYPE=dtype, CHUNK=CHUNK, HAS_GATE=1, VARLEN=int(call.varlen))
    return Launch(
        "sm90/gates.cu",
        "token_factors",
        tuple(defines.items()),
        slots(call, CHUNK) * -(-call.HV // HEADS),
        32 * HEADS,
        0,
        (
            "beta",
            "g",
            "cu_seqlens",
            "token_factors",
            np.float32(call.scale),
            i32(call.N),
            i32(call.T),
            i32(call.HV),
        ),
        arch="sm_90a",
    )
