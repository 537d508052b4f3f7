"""Whole sequences on slots of a pool: `tokens/pool.cu` around a walk."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, Plan, i32

THREADS, ACCESSES = 256, 4
VECTOR = 4  # elements of a state per access, where they lie so


def on_pool(forward: Plan, call: Call) -> Plan:
    """Return the plan of a forward that reads its states from slots and leaves them there.

    All are read before any is written, so it does not matter which sequence is walked first.
    """
    if call.pool_dtype is None:
        return forward
    states = dict.fromkeys(("initial_state", "final_state"), (call.state_shape, call.state_dtype))
    return replace(
        forward,
        launches=(
            pool_states_launch(call, "initial_state"),
            *forward.launches,
            pool_states_launch(call, "final_state"),
        ),
        outputs={name: x for name, x in forward.outputs.items() if name not in states},
        workspace=forward.workspace | states,
    )


def pool_states_launch(call: Call, states: str) -> Launch:
    """The initial states from their slots, or the final ones to theirs."""
    assert call.pool_dtype is not None
    size = math.prod(call.state_shape[1:])
    fits = size % VECTOR == 0 and call.pool_alignment % (VECTOR * call.pool_dtype.itemsize) == 0
    vector = VECTOR if fits else 1
    defines = dict(
        POOL_DTYPE=C_TYPES[call.pool_dtype.name],
        VECTOR=vector,
        STORE=int(states == "final_state"),
    )
    return Launch(
        "tokens/pool.cu",
        "pool_states",
        tuple(defines.items()),
        call.N * -(-size // (THREADS * ACCESSES * vector)),
        THREADS,
        0,
        (
            "state_indices",
            "output_state_indices",
            "fresh",
            "state",
            states,
            np.int64(size),
            np.int64(call.pool_stride),
            i32(call.pool_slots),
        ),
    )
