"""`chunk_delta_rule` with a gate per key channel in segments that begin from zero, where gates
forget what came before; elsewhere as without segments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...call import Call
from ..spec import Launch, Plan, carve, gate_type, i32
from .channel_whole import channel_forward_hopper_launch
from .cost import Cut
from .tiles import CHUNK

LEADS = np.dtype(np.int32)
PARTS = 4  # threads of a channel that sum a chunk
# So many blocks leave in the time of a launch, where each of more takes its own.
LEAVE_AT_ONCE = 2048


def supports_cut(call: Call) -> bool:
    """Whether segments may begin from zero, of a call that one kernel computes.

    What is left of a state is looked at in 16 bits, which need the exponents of a float.
    """
    return call.dtype.name == "bfloat16"


def plan_cut(call: Call, cut: Cut, otherwise: Plan, common: int) -> Plan:
    """Plan the walk of segments, and `otherwise` for where it is declined.

    Which of the two computes a call is decided on the device, where kernels of the other leave at
    once. The first launches, as many as are `common`, belong to both.
    """
    segments = call.N * (cut.segments - 1) * call.HV
    blocks = call.N * cut.segments * call.HV
    arrays = {
        "leads": ((segments,), LEADS),
        "declined": ((1,), LEADS),
        "lead_p": ((blocks, call.K, call.K), call.dtype),
    }
    launches = (
        *otherwise.launches[:common],
        channel_leads_hopper_launch(call, cut),
        channel_forward_hopper_launch(call, cut),
        *map(if_declined, otherwise.launches[common:]),
    )
    return replace(otherwise, launches=launches, workspace=otherwise.workspace | arrays)


def if_declined(launch: Launch) -> Launch:
    """The same, which does nothing if segments were walked."""
    arguments, blocks = launch.arguments, launch.grid
    numbers = next(i for i, x in enumerate(arguments) if isinstance(x, np.generic))
    more: tuple = ("declined",)
    if launch.entry == "channel_factors_hopper":
        more = "declined", np.uint32(blocks)
        blocks = -(-blocks // -(-blocks // LEAVE_AT_ONCE))
    return replace(
        launch,
        grid=blocks,
        defines=(*launch.defines, ("IF_DECLINED", 1)),
        arguments=(*arguments[:numbers], *more, *arguments[numbers:]),
    )


def channel_leads_hopper_launch(call: Call, cut: Cut) -> Launch:
    """How many chunks before its own each segment's walk begins, by its gates."""
    p = call
    return Launch(
        "sm90/channel_leads.cu",
        "channel_leads_hopper",
        (("GATE", gate_type(p)), ("HEAD_K", p.K), ("CHUNK", CHUNK)),
        p.N * (cut.segments - 1) * p.HV,
        PARTS * p.K,
        carve((PARTS * p.K, 4), (p.K // 32, 4)),
        ("g", "leads", "declined", i32(p.T), i32(p.HV), *(i32(x) for x in cut)),
    )
