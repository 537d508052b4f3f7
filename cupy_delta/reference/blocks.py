"""The building blocks: WY factors, state pass, outputs and transfers, each on its own."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..problem import Problem, check_chunk_axis
from .chunk import forward_block, load_block, load_decay, load_rows, solve_unit_lower
from .chunkwise import chunk_of, walk_all
from .decay import transpose
from .parallel import for_each
from .tiles import Item


def wy_factors(problem: Problem):
    """Return (w, u, t): one solve with [diag(beta), beta e^G K, beta V] on the right."""
    chunk = chunk_of(problem)
    tokens = (problem.B, problem.T, problem.HV)
    w, u = (np.empty((*tokens, size), problem.dtype) for size in (problem.K, problem.V))
    t = np.zeros((*tokens, chunk), problem.dtype)

    def walk(item: Item) -> None:
        for span in item.spans:
            block, C, K = load_block(problem, span), span.chunk, problem.K
            stack = block.b.shape[:-1]
            right = np.empty((*stack, C + K + problem.V), problem.compute_dtype)
            right[..., :C] = block.b * np.eye(C, dtype=right.dtype)
            right[..., C : C + K] = block.b * block.k_read
            right[..., C + K :] = block.b * block.v
            solved = solve_unit_lower(block.A, right)
            span.store_value_heads(t[..., :C], solved[..., :C])
            span.store_value_heads(w, solved[..., C : C + K])
            span.store_value_heads(u, solved[..., C + K :])

    walk_all(problem, walk)
    return w, u, t


def state_pass(problem: Problem):
    """Return (states, v_new, final_state)."""
    chunk = chunk_of(problem)
    dtype = problem.compute_dtype
    slots = problem.chunk_slots(chunk)
    shape = (problem.B, slots, problem.HV, problem.K, problem.V)
    states = np.zeros(shape, problem.state_dtype)
    v_new = np.empty(problem.u.shape, problem.dtype)
    final_state = np.empty(problem.state_shape, problem.state_dtype)

    def walk(item: Item) -> None:
        S, slot = _entering(problem, item), item.first_slot
        for span in item.spans:
            decay = load_decay(problem, span)
            k_write = decay.write(load_rows(problem, span, problem.k)[0])
            w, u = span.value_heads(problem.w, dtype), span.value_heads(problem.u, dtype)
            N = np.empty_like(u)
            for i in range(span.stack[0]):
                states[span.b, slot, item.heads] = S.reshape(-1, *S.shape[2:])
                N[:, :, i] = u[:, :, i] - w[:, :, i] @ S
                S = decay.carry(S, i) + transpose(k_write[:, :, i]) @ N[:, :, i]
                slot += 1
            span.store_value_heads(v_new, N)
        final_state[item.index, item.heads] = S.reshape(-1, *S.shape[2:])

    walk_all(problem, walk)
    return states, v_new, final_state


def chunk_output(problem: Problem):
    """Return o."""
    chunk = chunk_of(problem)
    check_chunk_axis(problem, chunk)
    dtype = problem.compute_dtype
    o = np.empty(problem.v_new.shape, problem.dtype)

    def walk(item: Item) -> None:
        slot = item.first_slot
        for span in item.spans:
            n = span.stack[0]
            S = np.asarray(problem.states[span.b, slot : slot + n, item.heads], dtype)
            S = S.swapaxes(0, 1).reshape(-1, item.groups, n, *S.shape[2:])
            decay, k = load_decay(problem, span), load_rows(problem, span, problem.k)[0]
            q = load_rows(problem, span, problem.q)[0] * dtype.type(problem.scale)
            N = span.value_heads(problem.v_new, dtype)
            span.store_value_heads(o, decay.read(q) @ S + decay.pairs(q, k) @ N)
            slot += n

    walk_all(problem, walk)
    return o


def sequence_transfer(problem: Problem):
    """Return (p, h): the state pass of [P | H] from [I | 0] with values [0 | V]."""
    N, HV, K, V = problem.N, problem.HV, problem.K, problem.V
    p = np.empty((N, HV, K, K), problem.state_dtype)
    h = np.empty((N, HV, K, V), problem.state_dtype)

    def walk(item: Item) -> None:
        heads = item.heads.stop - item.heads.start
        S = np.zeros((heads // item.groups, item.groups, K, K + V), problem.compute_dtype)
        S[..., :K] = np.eye(K)
        for span in item.spans:
            block = load_block(problem, span)
            right = np.zeros((*block.v.shape[:-1], K + V), block.v.dtype)
            right[..., K:] = block.v
            S = forward_block(dataclasses.replace(block, v=right), S)
        S = S.reshape(-1, *S.shape[2:])
        p[item.index, item.heads], h[item.index, item.heads] = S[..., :K], S[..., K:]

    walk_all(problem, walk)
    return p, h


def affine(p, x, h):
    """Return P x + H, or P x where h is None, for stacks (N, HV, K, .)."""
    y = np.empty(x.shape, x.dtype)

    def one(n: int) -> None:
        np.matmul(p[n], x[n], out=y[n])
        if h is not None:
            y[n] += h[n]

    for_each(one, ((n,) for n in range(len(x))))
    return y


def joined(told, ranks: range, shape: tuple[int, ...]):
    """Return the state that the transfers in these rows of `told` leave, in the order of `ranks`.

    A row holds P and H, (N, HV, K, V), of a rank; of the first only H counts.
    """
    N, HV, K = shape[:3]
    maps = N * HV * K * K
    state = None
    for rank in ranks:
        h = told[rank, maps:].reshape(shape)
        p = told[rank, :maps].reshape(N, HV, K, K)
        state = h if state is None else affine(p, state, h)
    return state


def _entering(problem: Problem, item: Item):
    if problem.initial_state is not None:
        return item.states(problem.initial_state, problem.state_dtype)
    heads = item.heads.stop - item.heads.start
    shape = (heads // item.groups, item.groups, problem.K, problem.V)
    return np.zeros(shape, problem.state_dtype)
