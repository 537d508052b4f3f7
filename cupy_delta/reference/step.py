"""Decoding: a pool of states advanced by a few tokens, in place."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .parallel import for_each
from .token_loop import TokenInputs, advance, read, token_inputs


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated."""
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    pool = problem.state if problem.state_layout == "kv" else problem.state.swapaxes(-1, -2)
    indices = problem.state_indices
    slots = range(problem.B) if indices is None else indices.tolist()

    def walk(b: int, slot: int) -> None:
        if slot < 0:
            o[b] = 0
            return
        S = pool[slot].astype(problem.state_dtype, order="C")
        S = S.reshape(1, problem.H, problem.groups, problem.K, problem.V)
        inputs = token_inputs(problem, slice(b, b + 1), slice(0, problem.T))
        for t in range(problem.T):
            x = TokenInputs(*(None if a is None else a[:, t] for a in inputs))
            S, _ = advance(S, x)
            o[b, t] = read(S, x.q).reshape(problem.HV, problem.V)
        pool[slot] = S.reshape(problem.HV, problem.K, problem.V)

    for_each(walk, enumerate(slots))
    return o
