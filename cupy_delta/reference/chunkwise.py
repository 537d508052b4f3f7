"""The chunkwise operator and its gradients: walks over sequences, block after block.

Memory beyond inputs and outputs is bounded: a thread holds one block of at most 4 chunks, and
the forward keeps one state per block, from which the backward runs the block again.
"""

from __future__ import annotations

import numpy as np

from ..problem import Problem, check_checkpoints
from .chunk import Trace, backward_block, forward_block, load_block
from .inputs import beta_gradient, gate_gradient, native
from .parallel import for_each
from .tiles import DEFAULT_CHUNK, Item, Span, block_count, items


def chunk_delta_rule(problem: Problem):
    """Return (o, final_state, checkpoints), the last None if none are asked for."""
    checkpoints = None
    if problem.checkpoint_every is not None:
        check_checkpoints(problem, chunk_of(problem))
        checkpoints = np.zeros(problem.checkpoint_shape, problem.state_dtype)
    o, final_state = _forward(problem, checkpoints=checkpoints)
    return o, final_state, checkpoints


def chunk_delta_rule_fwd(problem: Problem):
    """Return (o, final_state, saved); saved holds the state entering each block."""
    chunk = chunk_of(problem)
    shape = (block_count(problem, chunk), problem.HV, problem.K, problem.V)
    entering = np.empty(shape, problem.state_dtype)
    o, final_state = _forward(problem, entering=entering)
    return o, final_state, {"checkpoints": entering}


def chunk_delta_rule_bwd(residuals, do, dfinal_state):
    """Return the gradients of (q, k, v, beta, g, initial_state)."""
    problem, checkpoints = residuals.problem, residuals.saved["checkpoints"]
    dq, dk, dv = (np.empty(x.shape, problem.dtype) for x in (problem.q, problem.k, problem.v))
    dbeta, dg = beta_gradient(problem), gate_gradient(problem, len(checkpoints))
    dinitial = np.empty(problem.state_shape, problem.state_dtype)
    dtype = problem.compute_dtype

    def walk(item: Item) -> None:
        D = _state_in(problem, item, dfinal_state, item.index)
        for j in reversed(range(len(item.spans))):
            span = item.spans[j]
            number = item.first_block + j
            S = checkpoints[number, item.heads]
            S = S.reshape(-1, item.groups, *S.shape[1:])
            block = load_block(problem, span)
            trace = Trace(block)
            forward_block(block, S, trace=trace)
            gradients, D = backward_block(problem, block, trace, span.value_heads(do, dtype), D)
            span.store_key_heads(dq, gradients.q)
            span.store_key_heads(dk, gradients.k)
            span.store_value_heads(dv, gradients.v)
            dbeta.store(span, number, gradients.beta)
            if dg is not None:
                dg.store(span, number, gradients.g)
        _state_out(problem, item, dinitial, item.index, D)

    walk_all(problem, walk)
    gradients = dq, dk, dv, dbeta.result, None if dg is None else dg.result
    if problem.initial_state is None:
        return *gradients, None
    return *gradients, dinitial.astype(native(problem.initial_state), copy=False)


def chunk_of(problem: Problem) -> int:
    """The chunk size in force."""
    return problem.chunk_size or DEFAULT_CHUNK


def _forward(problem: Problem, entering=None, checkpoints=None):
    """Return (o, final_state).

    Keeps the state entering each block in `entering`, and those after every `checkpoint_every`
    tokens in `checkpoints`, if given.
    """
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    given, final_state = problem.initial_state, problem.state
    if final_state is None:
        final_state = np.empty(problem.state_shape, problem.state_dtype)
    else:
        given = problem.state
    dtype = problem.compute_dtype

    def walk(item: Item) -> None:
        S = _state_in(problem, item, given, _slot_read(problem, item.index))
        for j, span in enumerate(item.spans):
            if entering is not None:
                entering[item.first_block + j, item.heads] = S.reshape(-1, *S.shape[2:])
            block = load_block(problem, span)
            tile = np.empty(block.v.shape, dtype)
            leave = None
            if problem.checkpoint_every is not None:
                leave = _keeping(problem, checkpoints, problem.checkpoint_every, item, span)
            S = forward_block(block, S, tile, leave=leave)
            span.store_value_heads(o, tile)
        _state_out(problem, item, final_state, _slot_written(problem, item.index), S)

    walk_all(problem, walk)
    return o, final_state


def _slot_read(problem: Problem, n: int) -> int:
    """The place of the state that sequence n starts from; negative: it starts from zero."""
    if problem.fresh is not None and problem.fresh[n]:
        return -1
    return n if problem.state_indices is None else int(problem.state_indices[n])


def _slot_written(problem: Problem, n: int) -> int:
    """The place of the state that sequence n leaves; negative: there is none."""
    indices = problem.output_state_indices
    indices = problem.state_indices if indices is None else indices
    return n if indices is None else int(indices[n])


def _keeping(problem: Problem, checkpoints, every: int, item: Item, span: Span):
    """Return what keeps the states after every so many tokens of a sequence."""
    start = item.spans[0].start
    first = start // every if problem.varlen else 0

    def leave(i: int, S) -> None:
        tokens = span.start - start + (i + 1) * span.chunk
        if tokens % every == 0:
            _state_out(problem, item, checkpoints[span.b], first + tokens // every - 1, S)

    return leave


def walk_all(problem: Problem, walk) -> None:
    """Call `walk` for every item of a problem, in threads where they pay."""
    chunk, K, V = chunk_of(problem), problem.K, problem.V
    products = problem.B * problem.T * problem.HV * (3 * K * V + chunk * (K + V))
    for_each(walk, ((item,) for item in items(problem, chunk)), products)


def _state_in(problem: Problem, item: Item, states, index: int):
    """Load an item's states (h, G, K, V) from the API's layout; zero where there are none."""
    if states is None or index < 0:
        heads = item.heads.stop - item.heads.start
        shape = (heads // item.groups, item.groups, problem.K, problem.V)
        return np.zeros(shape, problem.state_dtype)
    S = item.states(states, problem.state_dtype, index)
    return S if problem.state_layout == "kv" else np.ascontiguousarray(S.swapaxes(-1, -2))


def _state_out(problem: Problem, item: Item, states, index: int, S) -> None:
    """Store an item's states; nothing where there is no place for them."""
    if index >= 0:
        S = S.reshape(-1, *S.shape[2:])
        states[index, item.heads] = S if problem.state_layout == "kv" else S.swapaxes(-1, -2)
