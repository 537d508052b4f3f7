"""`chunk_delta_rule` with a gate per key channel on ragged sequences: in one kernel where none is
much longer than others, which is looked at on the device; elsewhere as without that kernel.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...call import Call
from ..spec import Plan
from .channel_cut import if_declined
from .channel_whole import channel_forward_hopper_launch


def plan_ragged(call: Call, most: int, otherwise: Plan, common: int) -> Plan:
    """Plan one kernel, and `otherwise` for sequences of more than `most` chunks.

    The first launches, as many as are `common`, belong to both.
    """
    launches = (
        *otherwise.launches[:common],
        channel_forward_hopper_launch(call, most=most),
        *map(if_declined, otherwise.launches[common:]),
    )
    declined = {"declined": ((1,), np.dtype(np.int32))}
    return replace(otherwise, launches=launches, workspace=otherwise.workspace | declined)
