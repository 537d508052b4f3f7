"""`chunk_delta_rule` with a gate per key channel in one kernel, where heads fill the device."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import Launch, Plan, carve, gate_type, gates_as_given, i32, normal, variant
from ..tokens.l2norm import normalised
from .cost import Cut
from .tiles import BARRIER, BOX, CHUNK, TILE, box

HEAD = 128  # of keys and of values
BLOCKS = 4  # of 16 tokens in a chunk
KEY_STAGES, STAGES, MATH = 2, 3, 2
POWER_ROWS = 11
OWN_PAIRS = 384  # floats of a block and half of the channels


def supports_whole(call: Call) -> bool:
    """Whether one kernel computes a call."""
    return call.K == call.V == HEAD


def plan_whole(call: Call) -> Plan:
    """Plan `chunk_delta_rule` in one kernel."""
    outputs = {
        "o": (call.value_shape, call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    launches, workspace = normalised(call, "q", "k")
    launches.append(channel_forward_hopper_launch(call))
    return Plan(tuple(launches), outputs, workspace, as_given=gates_as_given(call))


def channel_forward_shared(cut: bool = False) -> int:
    """Return the bytes of shared memory, as sm90/channel_forward/shared.cuh carves them."""
    count, size = TILE
    boxes = HEAD // BOX
    tiles = (2 * KEY_STAGES + 2 * STAGES) * boxes + STAGES + MATH
    rows = (STAGES * POWER_ROWS * HEAD, 2), (STAGES * BLOCKS * HEAD, 4), (STAGES * HEAD, 4)
    own = 0 if cut else 2 * (BLOCKS - 1) * OWN_PAIRS  # where walkers scale rows
    tokens = (HEAD, 4), (STAGES * CHUNK, 4), (own, 4), (STAGES * 2 * BLOCKS, 4), (cut, 4)
    barriers = 2 * KEY_STAGES + 5 * STAGES + MATH + (0 if cut else STAGES + MATH + 2)
    end = carve(*rows, *tokens, start=tiles * count * size)
    return -(-end // BARRIER) * BARRIER + barriers * BARRIER


def channel_forward_hopper_launch(call: Call, cut: Cut | None = None, most: int = 0) -> Launch:
    """The walk, factors included, a block per sequence or segment and value head.

    Of ragged sequences `most` is how many chunks the longest may have.
    """
    p = call
    defines = variant(p, CHUNK, STATE_VK=int(p.state_layout == "vk"), GATE=gate_type(p))
    segments: tuple = ()
    if cut is not None:
        defines = (*defines, ("CUT", 1))
        segments = ("leads", "lead_p", "declined", *(i32(x) for x in cut))
    ragged: tuple = ()
    if p.varlen:
        ragged = ("cu_seqlens", "o", "declined", i32(p.N), i32(most))
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)
    return Launch(
        "sm90/channel_forward.cu",
        "channel_forward_hopper",
        defines,
        p.N * (cut.segments if cut else 1) * p.HV,
        128 * (MATH + 2),
        channel_forward_shared(cut is not None),
        (
            box(normal(p, "q"), keys),
            box(normal(p, "k"), keys),
            box("v", values),
            box("o", values),
            "beta",
            "g",
            "initial_state",
            "final_state",
            *segments,
            *ragged,
            np.float32(p.scale),
            i32(p.T),
            i32(p.H),
            i32(p.HV),
        ),
        arch="sm_90a",
    )
