"""Decoding: a pool of states advanced by a few tokens of every sequence, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..problem import Problem
from .parallel import call_quietly, for_each
from .token_loop import (
    ALL,
    advance,
    read,
    shared_products,
    single_inputs,
    single_shapes,
    token_inputs,
)

# Elements of all states together below which a call's time is that of calling NumPy; BLAS uses one
# thread for so few.
SMALL_POOL = 1 << 13
# Elements of states that are advanced together, if those of a sequence are fewer: half of a cache.
ELEMENTS_AT_ONCE = 1 << 16


class Part(NamedTuple):
    """Sequences of one length that are advanced together, as indices of what they have.

    `tokens` is None where they are whole batch rows, else (sequences, length). `kept` says after
    how many tokens their states go to `targets`; None, after all of them and to `slots`. Without
    `slots` they are padding, whose outputs are zero.
    """

    rows: Any
    tokens: np.ndarray | None
    length: int
    slots: Any
    targets: Any = None
    kept: np.ndarray | None = None


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated."""
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    pool = problem.state if problem.state_layout == "kv" else problem.state.swapaxes(-1, -2)
    few, parts = _division(problem)
    if few:
        for part in parts:
            call_quietly(_advance_part, (problem, pool, o, part))
    else:
        items = [(problem, pool, o, part) for part in parts]
        for_each(_advance_part, items, shared_products(problem))
    return o


def _advance_part(problem: Problem, pool, o, part: Part) -> None:
    """Advance the states of a part of the pool, (K, V) as an axis order, and write its outputs."""
    rows, tokens, length, slots, _, kept = part
    dtype = problem.compute_dtype
    if slots is None:
        o[rows if tokens is None else (rows, tokens)] = 0
        return
    in_place = kept is None and isinstance(slots, slice) and pool.dtype == dtype
    in_place = in_place and pool.flags.carray
    if in_place and length == 1 and o.dtype == dtype:
        shapes = single_shapes(problem)
        x = single_inputs(problem, rows, shapes)
        S = pool[slots].reshape(shapes.state)
        advance(S, x)
        read(S, x.q, out=o[rows].reshape(shapes.value))
        return
    S = pool[slots] if in_place else np.array(pool[slots], dtype, order="C")
    states = S.reshape(-1, problem.H, problem.groups, problem.K, problem.V)
    inputs = token_inputs(problem, rows, tokens)
    for t in range(length):
        if kept is not None:
            _keep(pool, part, S, t)
        x = inputs.at(t)
        advance(states, x)
        place = t if tokens is None else tokens[:, t]
        o[rows, place] = read(states, x.q).reshape(-1, problem.HV, problem.V)
    if kept is not None:
        _keep(pool, part, S, length)
    elif not in_place:
        pool[slots] = S


def _division(problem: Problem) -> tuple[bool, Sequence[Part]]:
    """Return whether states are few, and the parts; kept where no index tells calls apart."""
    found = problem.kept.get(Part)
    if found is not None:
        return found
    size = problem.HV * problem.K * problem.V
    if problem.varlen or problem.accepting or problem.output_state_indices is not None:
        return problem.N * size < SMALL_POOL, list(_general_parts(problem, size))
    indices = problem.state_indices
    if indices is None:
        found = problem.kept[Part] = _parts(problem.T, None, None, problem.B, size)
        return found
    used = np.flatnonzero(indices >= 0)
    few, parts = _parts(problem.T, indices, used, len(used), size)
    if len(used) < problem.B:
        parts = [*parts, Part(indices < 0, None, problem.T, None)]
    return few, parts


def _keep(pool, part: Part, S, t: int) -> None:
    """Write the states of those sequences that take up their first t tokens."""
    there = (part.kept == t) & (part.targets >= 0)
    if t == 0:
        there &= part.targets != part.slots  # what is left alone keeps every bit
    if there.any():
        pool[part.targets[there]] = S[there]


def _parts(T: int, indices, used, count: int, size: int) -> tuple[bool, Sequence[Part]]:
    """Divide batch rows that have T tokens each: few states are one part."""
    if count * size < SMALL_POOL:
        one = Part(ALL, None, T, ALL) if used is None else Part(used, None, T, indices[used])
        return True, (one,)
    at_once = max(1, ELEMENTS_AT_ONCE // size)
    parts = []
    for first in range(0, count, at_once):
        some: Any = slice(first, first + at_once)
        if used is None:
            rows = slots = some
        elif at_once > 1:
            rows, slots = used[some], indices[used[some]]
        else:
            b, slot = int(used[first]), int(indices[used[first]])
            rows, slots = slice(b, b + 1), slice(slot, slot + 1)
        parts.append(Part(rows, None, T, slots))
    return False, parts


def _general_parts(problem: Problem, size: int) -> Iterator[Part]:
    """Yield sequences of any lengths that are advanced together, and padding of each length."""
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
            if padding:
                rows, tokens = (0, tokens) if problem.varlen else (ours, None)
                yield Part(rows, tokens, int(length), None)
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
