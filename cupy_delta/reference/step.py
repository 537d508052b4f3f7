"""Decoding: a pool of states advanced by a few tokens, in place."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .parallel import call_quietly, for_each
from .token_loop import advance, read, shared_products, token_inputs

# Elements of all states together below which a call's time is that of calling NumPy; BLAS uses one
# thread for so few.
SMALL_POOL = 1 << 13
# Elements of states that are advanced together, if those of a sequence are fewer: half of a cache.
ELEMENTS_AT_ONCE = 1 << 16


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated."""
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    dtype, indices, HV = problem.compute_dtype, problem.state_indices, problem.HV
    pool = problem.state if problem.state_layout == "kv" else problem.state.swapaxes(-1, -2)
    # Whether states can be advanced where they lie.
    ready = pool is problem.state and pool.dtype == dtype and pool.flags.aligned
    stack = (-1, problem.H, problem.groups, problem.K, problem.V)

    def walk(rows, slots) -> None:
        in_place = ready and isinstance(slots, slice)
        S = pool[slots] if in_place else np.array(pool[slots], dtype, order="C")
        states = S.reshape(stack)
        inputs = token_inputs(problem, rows)
        for t in range(problem.T):
            x = inputs.at(t)
            advance(states, x)
            o[rows, t] = read(states, x.q).reshape(-1, HV, problem.V)
        if not in_place:
            pool[slots] = S

    used = None if indices is None else np.flatnonzero(indices >= 0)
    count = problem.B if used is None else len(used)
    if count < problem.B:
        o[indices < 0] = 0
    size = HV * problem.K * problem.V
    if count * size < SMALL_POOL:
        whole = slice(None)
        call_quietly(walk, (whole, whole) if used is None else (used, indices[used]))
        return o
    for_each(walk, _parts(indices, used, count, size), shared_products(problem))
    return o


def _parts(indices, used, count: int, size: int):
    """Yield the batch rows and slots of sequences that are advanced together."""
    at_once = max(1, ELEMENTS_AT_ONCE // size)
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        if used is None:
            yield part, part
        elif at_once > 1:
            yield used[part], indices[used[part]]
        else:
            b = int(used[first])
            slot = int(indices[b])
            yield slice(b, b + 1), slice(slot, slot + 1)
