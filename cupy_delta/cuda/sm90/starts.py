"""Where walks of segments start from nothing, since gates forget what comes before."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, carve, i32, normal
from .segments import Part
from .tiles import CHUNK

WARPS, GROUP = 32, 8  # per block; value heads of a block


def start_arrays(call: Call, segments: int) -> dict:
    """How many chunks before each segment but the first a walk may start from zero, or -1."""
    return {"starts": ((call.N, segments - 1, call.HV), np.dtype(np.int32))}


def segment_starts_launch(
    call: Call,
    part: Part,
    most: int,
    *,
    backward: bool = False,
    records: bool = True,
    other: Part | None = None,
) -> Launch:
    """Look before every segment but the first, in the order of the walk, at up to `most` chunks.

    At the records of chunks that sm90/gates.cu leaves, or at what sm90/factors.cu does. With
    `other`, another division, starts of the second segment decide between the two.
    """
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        CHUNK=CHUNK,
        HAS_GATE=1,
        VARLEN=int(call.varlen),
        BACKWARD=int(backward),
        RECORDS=int(records),
        WARPS=WARPS,
    )
    return Launch(
        "sm90/starts.cu",
        "segment_starts",
        tuple(defines.items()),
        call.N * (part.segments - 1) * call.H * -(-call.groups // GROUP),
        32 * WARPS,
        carve((GROUP, 4), (WARPS * GROUP, 4)),
        (
            normal(call, "k"),
            "token_factors" if records else "decays",
            None if records else "beta",
            "cu_seqlens",
            "starts",
            i32(call.T),
            i32(call.H),
            i32(call.HV),
            *(i32(x) for x in part[:3]),
            *(i32(x) for x in ((0, 0, 0) if other is None else other[:3])),
            i32(most),
        ),
        arch="sm_90a",
    )
