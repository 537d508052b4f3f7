"""The definition: the delta rule token by token, in the order of the recurrence.

Per token, with S of shape (..., K, V)::

    S <- exp(g) S,   r = v - S^T k,   S <- S + k (beta r)^T,   o = scale S^T q
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg.blas import dger, sger

from ..problem import Problem
from .inputs import load_beta, load_gate
from .parallel import for_each
from .tiles import l2norm

# Elements of a state from which BLAS pays for the time of calling it.
LARGE_STATE = 1 << 12
# Elements of all heads' states from which a token is more work for NumPy than for Python.
LONG_TOKEN = 1 << 17


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
            x = inputs.at(t)
            advance(S, x)
            o[rows, tokens.start + t] = read(S, x.q).reshape(-1, problem.HV, problem.V)
        view[index] = S.reshape(-1, problem.HV, *S.shape[3:])

    for_each(walk, batches(problem), shared_products(problem))
    return o, final_state


class TokenInputs(NamedTuple):
    """Inputs shaped to broadcast against states (B, H, G, K, V), with or without a time axis."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    g: np.ndarray | None

    def at(self, t: int) -> TokenInputs:
        """Return the inputs of one of the tokens along axis 1."""
        q, k, v, beta, g = self
        one = None if g is None else g[:, t]
        return TokenInputs(q[:, t], k[:, t], v[:, t], beta[:, t], one)


def shared_products(problem: Problem) -> int:
    """Count the multiplications that threads could share: none of tokens that are short."""
    token = problem.HV * problem.K * problem.V
    return problem.B * problem.T * token if token >= LONG_TOKEN else 0


def batches(problem: Problem):
    """Yield (batch rows, tokens, sequences) that advance together."""
    if problem.cu_seqlens is None:
        if problem.B:
            yield slice(0, problem.B), slice(0, problem.T), slice(0, problem.B)
        return
    for b, start, stop, n in problem.sequences():
        yield slice(b, b + 1), slice(start, stop), slice(n, n + 1)


def token_inputs(problem: Problem, rows, tokens=None) -> TokenInputs:
    """Load inputs (B, t, H, G, ...): q and k as rows (1, K), scaled and normalised; v as (V,).

    Of some batch rows, and of a slice of tokens or all of them.

    Always C-contiguous, so that strides of the caller's arrays never change a bit of the result.
    """
    dtype, H, G, K = problem.compute_dtype, problem.H, problem.groups, problem.K

    def load(x):
        return np.ascontiguousarray(x[rows] if tokens is None else x[rows, tokens], dtype)

    q, k, v, g = load(problem.q), load(problem.k), load(problem.v), None
    beta = load_beta(problem, load)
    if problem.qk_l2norm:
        q, k = l2norm(q)[0], l2norm(k)[0]
    q = q * dtype.type(problem.scale)
    B, T = q.shape[:2]
    if problem.gate is not None:
        channels = 1 if problem.gate == "scalar" else K
        g = load_gate(problem, load, lambda x: np.asarray(x, dtype))
        g = g.reshape(B, T, H, G, channels, 1)
    return TokenInputs(
        q.reshape(B, T, H, 1, 1, K),
        k.reshape(B, T, H, 1, 1, K),
        v.reshape(B, T, H, G, problem.V),
        beta.reshape(B, T, H, G, problem.V if problem.beta_per_value else 1),
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
    """Advance contiguous states by one token, in place; return the token's r = v - S^T k."""
    if x.g is not None:
        S *= np.exp(x.g)
    r = x.v - (x.k @ S)[..., 0, :]
    _add_outer(S, x.k, x.beta * r)
    return r


def read(S, q):
    """S^T q, with the scale already in q."""
    return (q @ S)[..., 0, :]


def _add_outer(S, k, w) -> None:
    """S += k w^T, in place."""
    K, V = S.shape[-2:]
    if K * V < LARGE_STATE:
        S += k.swapaxes(-1, -2) * w[..., None, :]
        return
    # In one pass over S, where the product on its own would take two and as much memory again.
    add = _GER[S.dtype]
    k = np.broadcast_to(k, (*w.shape[:-1], 1, K)).reshape(-1, K)
    for one, row, column in zip(S.reshape(-1, K, V), w.reshape(-1, V), k, strict=True):
        add(1.0, row, column, a=one.T, overwrite_a=True)


_GER = {np.dtype(np.float32): sger, np.dtype(np.float64): dger}
