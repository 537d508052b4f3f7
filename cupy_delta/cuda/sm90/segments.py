"""Segments of a sequence that are walked at once, and what transfers leave for joining them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...call import Call
from ..spec import SUMS, TensorBox, slots
from .tiles import BOX, CHUNK, FACTOR_HEADS, RECORD_WORDS


class Part(NamedTuple):
    """The segments of every sequence that one launch walks, as the kernel's last arguments.

    Of those that are walked the first `transferred` have a transfer.
    """

    segments: int = 1
    first_percent: int = 100
    last_percent: int = 100
    first: int = 0
    walked: int = 1
    transferred: int = 0


WHOLE = Part()


def segment_arrays(call: Call, transferred: int, keeps_x: bool = False) -> dict:
    """What transfers leave, as sm90/join.cuh has it: H, P and decays; X if it is kept."""
    if not transferred:
        return {}
    keys, values = (-(-size // BOX) * BOX for size in (call.K, call.V))
    arrays = {
        "segment_h": ((call.N, transferred, call.HV, values, keys), call.state_dtype),
        "segment_p": ((call.N * transferred, call.HV, call.K, call.K), call.dtype),
    }
    if call.gate is not None:
        channels = (call.K,) if call.gate == "channel" else ()
        shape = (call.N * transferred, call.HV, *channels)
        arrays["segment_decays"] = (shape, call.state_dtype)
    if keeps_x:
        arrays["segment_x"] = ((slots(call, CHUNK), call.HV, CHUNK, CHUNK), call.dtype)
    return arrays


def transfer_box(call: Call, transferred: int) -> TensorBox:
    """64 rows and columns of P."""
    shape, _ = segment_arrays(call, transferred)["segment_p"]
    return TensorBox("segment_p", shape, (1, 1, BOX, BOX))


def kept_box(call: Call) -> TensorBox:
    """X of one chunk and value head."""
    shape, _ = segment_arrays(call, 1, keeps_x=True)["segment_x"]
    return TensorBox("segment_x", shape, (1, 1, CHUNK, CHUNK))


def record_arrays(call: Call) -> dict:
    """What sm90/gates.cu leaves per chunk: a record per value head; a bit, if it is paired."""
    chunks = slots(call, CHUNK)
    return {
        "token_factors": ((chunks, call.HV, RECORD_WORDS), SUMS),
        "paired_heads": ((chunks, -(-call.HV // FACTOR_HEADS)), np.dtype(np.int32)),
    }
