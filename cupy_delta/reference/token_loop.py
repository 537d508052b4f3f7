"""The definition: the delta rule token by token, in the order of the recurrence.

Per token, with S of shape (..., K, V)::

    S <- exp(g) S,   r = v - S^T k,   S <- S + k (beta r)^T,   o = scale S^T q
"""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .parallel import for_each
from .tiles import l2norm


def recurrent_delta_rule(problem: Problem):
    """Return (o, final_state)."""
    o = problem.out
    if o is None:
        o = np.empty(problem.v.shape, problem.dtype)
    final_state = np.empty(problem.state_shape, problem.state_dtype)
    view = final_state if problem.state_layout == "kv" else final_state.swapaxes(-1, -2)

    def walk(rows: slice, tokens: slice, index: slice) -> None:
        S = initial_states(problem, problem.initial_state, index)
        inputs = token_inputs(problem, rows, tokens)
        for t in range(tokens.stop - tokens.start):
            x = TokenInputs(*(None if a is None else a[:, t] for a in inputs))
            S, _ = advance(S, x)
            o[rows, tokens.start + t] = read(S, x.q).reshape(-1, problem.HV, problem.V)
        view[index] = S.reshape(-1, problem.HV, *S.shape[3:])

    for_each(walk, batches(problem))
    return o, final_state


class TokenInputs(tuple):
    """(q, k, v, beta, g) shaped to broadcast against states (B, H, G, K, V)."""

    __slots__ = ()

    def __new__(cls, q, k, v, beta, g):
        return super().__new__(cls, (q, k, v, beta, g))

    q = property(lambda self: self[0])
    k = property(lambda self: self[1])
    v = property(lambda self: self[2])
    beta = property(lambda self: self[3])
    g = property(lambda self: self[4])


def batches(problem: Problem):
    """Yield (batch rows, tokens, sequences) that advance together."""
    if problem.cu_seqlens is None:
        if problem.B:
            yield slice(0, problem.B), slice(0, problem.T), slice(0, problem.B)
        return
    for b, start, stop, n in problem.sequences():
        yield slice(b, b + 1), slice(start, stop), slice(n, n + 1)


def token_inputs(problem: Problem, rows: slice, tokens: slice) -> TokenInputs:
    """Load inputs (B, t, H, G, ...): q and k as rows (1, K), scaled and normalised; v as (V,).

    Always C-contiguous, so that strides of the caller's arrays never change a bit of the result.
    """
    dtype, H, G = problem.compute_dtype, problem.H, problem.groups

    def key_heads(x):
        x = np.ascontiguousarray(x[rows, tokens], dtype)
        if problem.qk_l2norm:
            x, _ = l2norm(x)
        return x[:, :, :, None, None, :]

    def value_heads(x):
        x = np.ascontiguousarray(x[rows, tokens], dtype)
        return x.reshape(*x.shape[:2], H, G, *x.shape[3:])

    beta = value_heads(problem.beta)
    g = None
    if problem.g is not None:
        g = value_heads(problem.g)
        g = g[..., None, None] if problem.gate == "scalar" else g[..., None]
    return TokenInputs(
        key_heads(problem.q) * dtype.type(problem.scale),
        key_heads(problem.k),
        value_heads(problem.v),
        beta if problem.beta_per_value else beta[..., None],
        g,
    )


def initial_states(problem: Problem, states, index: slice):
    """Load states as (B, H, G, K, V); zero where there are none."""
    count = index.stop - index.start
    shape = (count, problem.H, problem.groups, problem.K, problem.V)
    if states is None:
        return np.zeros(shape, problem.state_dtype)
    S = states if problem.state_layout == "kv" else states.swapaxes(-1, -2)
    return np.array(S[index], problem.state_dtype, order="C").reshape(shape)


def advance(S, x: TokenInputs):
    """Return the state after one token, and the token's r = v - S^T k."""
    if x.g is not None:
        S = np.exp(x.g) * S
    r = x.v - (x.k @ S)[..., 0, :]
    return S + x.k.swapaxes(-1, -2) * (x.beta * r)[..., None, :], r


def read(S, q):
    """S^T q, with the scale already in q."""
    return (q @ S)[..., 0, :]
