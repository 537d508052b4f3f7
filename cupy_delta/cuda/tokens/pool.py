"""Whole sequences on slots of a pool: what walks are given of it, or copies around them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ...call import Call
from ..spec import C_TYPES, Launch, Plan, i32

THREADS, ACCESSES = 256, 4
VECTOR = 4  # elements of a state per access, where they lie so


def pool_macros(call: Call) -> dict:
    """Return the macros of a kernel that states in a pool are for, as `tiles/pool.cuh` has them."""
    if call.pool_dtype is None:
        return {}
    return dict(ON_POOL=1, POOL_DTYPE=C_TYPES[call.pool_dtype.name])


def pool_arguments(call: Call) -> tuple:
    """Return the arguments of such a kernel that name slots."""
    if call.pool_dtype is None:
        return ()
    arrays = ("state_indices", "output_state_indices", "fresh", "state")
    return (*arrays, np.int64(call.pool_stride), i32(call.pool_slots))


def on_pool(forward: Plan, call: Call) -> Plan:
    """Return the plan of a forward that reads its states from slots and leaves them there.

    Walks of whole sequences do so themselves. Around others all states are read before any is
    written: there the last segment may come to a slot before others have read it.
    """
    walks = any("state" in launch.arrays() for launch in forward.launches)
    if call.pool_dtype is None or walks:
        return forward
    states = dict.fromkeys(("initial_state", "final_state"), (call.state_shape, call.state_dtype))
    return replace(
        forward,
        launches=(
            pool_states_launch(call, "initial_state"),
            *forward.launches,
            pool_states_launch(call, "final_state"),
        ),
        workspace=forward.workspace | states,
    )


def pool_states_launch(call: Call, states: str) -> Launch:
    """The initial states from their slots, or the final ones to theirs."""
    assert call.pool_dtype is not None
    size = math.prod(call.state_shape[1:])
    fits = size % VECTOR == 0 and call.pool_alignment % (VECTOR * call.pool_dtype.itemsize) == 0
    vector = VECTOR if fits else 1
    defines = pool_macros(call) | dict(VECTOR=vector, STORE=int(states == "final_state"))
    return Launch(
        "tokens/pool.cu",
        "pool_states",
        tuple(defines.items()),
        call.N * -(-size // (THREADS * ACCESSES * vector)),
        THREADS,
        0,
        (*pool_arguments(call), states, np.int64(size)),
    )
