"""Decoding: a pool of states advanced by a few tokens, in place."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .parallel import call_quietly, for_each
from .token_loop import advance, read, token_inputs

# Elements of all states together below which a call's time is that of calling NumPy; BLAS uses one
# thread for so few.
SMALL_POOL = 1 << 13


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated."""
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    indices, T, HV = problem.state_indices, problem.T, problem.HV
    pool = problem.state if problem.state_layout == "kv" else problem.state.swapaxes(-1, -2)
    # Whether states can be advanced where they lie.
    ready = pool is problem.state and pool.dtype == problem.state_dtype and pool.flags.aligned
    stack = (-1, problem.H, problem.groups, problem.K, problem.V)

    def walk(rows, slots) -> None:
        in_place = ready and isinstance(slots, slice)
        S = pool[slots] if in_place else np.array(pool[slots], problem.state_dtype, order="C")
        states = S.reshape(stack)
        inputs = token_inputs(problem, rows)
        for t in range(T):
            x = inputs.at(t)
            advance(states, x)
            o[slice(None) if rows is None else rows, t] = read(states, x.q).reshape(
                -1, HV, problem.V
            )
        if not in_place:
            pool[slots] = S

    if indices is None:
        used = slots = np.arange(problem.B)
    else:
        used = np.flatnonzero(indices >= 0)
        slots = indices[used]
        if len(used) < problem.B:
            o[indices < 0] = 0
    if problem.B * HV * problem.K * problem.V < SMALL_POOL:
        whole = slice(None)
        call_quietly(walk, (whole, whole) if indices is None else (used, slots))
        return o
    pairs = zip(used.tolist(), slots.tolist(), strict=True)
    for_each(walk, ((slice(b, b + 1), slice(s, s + 1)) for b, s in pairs), threads=1)
    return o
