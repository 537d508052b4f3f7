"""Decoding: a pool of states advanced by a few tokens of every sequence, in place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..problem import Problem
from .parallel import call_quietly, for_each
from .token_loop import ALL, advance, read, shared_products, token_inputs

# Elements of all states together below which a call's time is that of calling NumPy; BLAS uses one
# thread for so few.
SMALL_POOL = 1 << 13
# Elements of states that are advanced together, if those of a sequence are fewer: half of a cache.
ELEMENTS_AT_ONCE = 1 << 16


class Part(NamedTuple):
    """Sequences of one length that are advanced together, as indices of what they have.

    `tokens` is None where they are whole batch rows, else (sequences, length). `kept` says after
    how many tokens their states go to `targets`; None, after all of them and to `slots`.
    """

    rows: Any
    tokens: np.ndarray | None
    length: int
    slots: Any
    targets: Any = None
    kept: np.ndarray | None = None


@cache
def _whole(T: int) -> Part:
    """All sequences, each with a slot of its own; a named tuple takes a while to make."""
    return Part(ALL, None, T, ALL)


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated."""
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    HV, dtype = problem.HV, problem.compute_dtype
    pool = problem.state if problem.state_layout == "kv" else problem.state.swapaxes(-1, -2)
    # Whether states can be advanced where they lie.
    ready = pool is problem.state and pool.dtype == dtype and pool.flags.carray
    stack = (-1, problem.H, problem.groups, problem.K, problem.V)

    def walk(part: Part) -> None:
        slots = part.slots
        in_place = ready and part.kept is None and isinstance(slots, slice)
        S = pool[slots] if in_place else np.array(pool[slots], dtype, order="C")
        states = S.reshape(stack)
        single = part.length == 1
        inputs = token_inputs(problem, part.rows, part.tokens, single=single)
        for t in range(part.length):
            if part.kept is not None:
                _keep(pool, part, S, t)
            x = inputs if single else inputs.at(t)
            advance(states, x)
            place = t if part.tokens is None else part.tokens[:, t]
            o[part.rows, place] = read(states, x.q).reshape(-1, HV, problem.V)
        if part.kept is not None:
            _keep(pool, part, S, part.length)
        elif not in_place:
            pool[slots] = S

    size = HV * problem.K * problem.V
    if problem.varlen or problem.accepting or problem.output_state_indices is not None:
        parts = list(_general_parts(problem, o, size))
        few = problem.N * size < SMALL_POOL
    else:
        indices = problem.state_indices
        used = None if indices is None else np.flatnonzero(indices >= 0)
        count = problem.B if used is None else len(used)
        if count < problem.B:
            o[indices < 0] = 0
        few = count * size < SMALL_POOL
        if few:
            one = _whole(problem.T) if used is None else Part(used, None, problem.T, indices[used])
            parts = [one]
        else:
            parts = list(_parts(problem.T, indices, used, count, size))
    if few:
        for part in parts:
            call_quietly(walk, (part,))
    else:
        for_each(walk, ((part,) for part in parts), shared_products(problem))
    return o


def _keep(pool, part: Part, S, t: int) -> None:
    """Write the states of those sequences that take up their first t tokens."""
    there = (part.kept == t) & (part.targets >= 0)
    if t == 0:
        there &= part.targets != part.slots  # what is left alone keeps every bit
    if there.any():
        pool[part.targets[there]] = S[there]


def _parts(T: int, indices, used, count: int, size: int) -> Iterator[Part]:
    """Yield batch rows that are advanced together, in place."""
    at_once = max(1, ELEMENTS_AT_ONCE // size)
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        if used is None:
            yield Part(some, None, T, some)
        elif at_once > 1:
            yield Part(used[some], None, T, indices[used[some]])
        else:
            b = int(used[first])
            slot = int(indices[b])
            yield Part(slice(b, b + 1), None, T, slice(slot, slot + 1))


def _general_parts(problem: Problem, o, size: int) -> Iterator[Part]:
    """Yield sequences of any lengths that are advanced together; outputs of padding become zero."""
    N, T = problem.N, problem.T
    slots = np.arange(N) if problem.state_indices is None else problem.state_indices
    targets = problem.output_state_indices
    targets = slots if targets is None else targets
    if problem.varlen:
        first, lengths = problem.cu_seqlens[:-1], np.diff(problem.cu_seqlens)
    else:
        first, lengths = np.zeros(N, int), np.full(N, T)
    kept = problem.accepted if problem.accepting else lengths
    at_once = max(1, ELEMENTS_AT_ONCE // size)
    for length in np.unique(lengths):
        for padding in (False, True):
            ours = np.flatnonzero((lengths == length) & ((slots < 0) == padding))
            tokens = first[ours, None] + np.arange(length)
            rows = 0 if problem.varlen else ours[:, None]
            if padding:
                o[rows, tokens] = 0
                continue
            for start in range(0, len(ours), at_once):
                some = slice(start, start + at_once)
                n = ours[some]
                yield Part(
                    0 if problem.varlen else n,
                    tokens[some] if problem.varlen else None,
                    int(length),
                    slots[n],
                    targets[n],
                    kept[n],
                )
