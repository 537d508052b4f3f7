"""The definition: the delta rule token by token, in the order of the recurrence.

Per token, with S of shape (..., K, V)::

    S <- exp(g) S,   r = v - S^T k,   S <- S + k (beta r)^T,   o = scale S^T q
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

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
ALL = slice(None)


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
    """Inputs as rows that meet states (..., K, V): q and k (1, K), v and beta (1, V or 1)."""

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


class SingleShapes(NamedTuple):
    """What inputs of one token are reshaped to, and the states that they meet.

    Heads of all sequences lie along one axis, and value heads of a group along a second one, if
    they are several: NumPy takes longer for every axis.
    """

    key: tuple[int, ...]
    value: tuple[int, ...]
    beta: tuple[int, ...]
    gate: tuple[int, ...]
    state: tuple[int, ...]


def single_shapes(problem: Problem) -> SingleShapes:
    """Derive them once for all calls that are alike."""
    found = problem.kept.get(SingleShapes)
    if found is None:
        K, V, one = problem.K, problem.V, (1,) * (problem.groups > 1)
        group = one and (problem.groups,)
        found = problem.kept[SingleShapes] = SingleShapes(
            key=(-1, *one, 1, K),
            value=(-1, *group, 1, V),
            beta=(-1, *group, 1, V if problem.beta_per_value else 1),
            gate=(-1, *group, K if problem.gate == "channel" else 1, 1),
            state=(-1, *group, K, V),
        )
    return found


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


@lru_cache(64)
def _number(dtype: np.dtype, x: float) -> Any:
    """A number as an array: making it takes NumPy as long as a product of few elements."""
    return np.array(x, dtype)


def token_inputs(problem: Problem, rows, tokens=None) -> TokenInputs:
    """Load inputs of some batch rows, and of a slice of tokens or all of them.

    They meet states (B, H, G, K, V), and have a time axis after B.
    """
    q, k, v, beta, g = _load(problem, rows, tokens)
    lead, G = (*q.shape[:2], problem.H), problem.groups
    row = (*lead, 1, 1, problem.K)
    return TokenInputs(
        q.reshape(row),
        k.reshape(row),
        v.reshape(*lead, G, 1, problem.V),
        beta.reshape(*lead, G, 1, problem.V if problem.beta_per_value else 1),
        g if g is None else g.reshape(*lead, G, problem.K if problem.gate == "channel" else 1, 1),
    )


def single_inputs(problem: Problem, rows, shapes: SingleShapes) -> TokenInputs:
    """Load inputs of some batch rows, which have one token each."""
    q, k, v, beta, g = _load(problem, rows)
    key, value, strength, gate, _ = shapes
    g = g if g is None else g.reshape(gate)
    # In half the time of its constructor.
    inputs = q.reshape(key), k.reshape(key), v.reshape(value), beta.reshape(strength), g
    return tuple.__new__(TokenInputs, inputs)


def _load(problem: Problem, rows, tokens=None):
    """Load q, k, v, beta and g, q scaled, q and k normalised where that is asked for.

    Always C-contiguous, so that strides of the caller's arrays never change a bit of the result.
    """
    dtype = problem.compute_dtype

    def load(x):
        if tokens is not None:
            x = x[rows, tokens]
        elif rows is not ALL:
            x = x[rows]
        return np.asarray(x, dtype, "C")

    q, k, v, g = load(problem.q), load(problem.k), load(problem.v), None
    beta = load_beta(problem, load)
    if problem.qk_l2norm:
        q, k = l2norm(q)[0], l2norm(k)[0]
    q = q * _number(dtype, problem.scale)
    if problem.gate is not None:
        g = load_gate(problem, load, lambda x: np.asarray(x, dtype))
    return q, k, v, beta, g


def initial_states(problem: Problem, states, index: slice):
    """Load states as (B, H, G, K, V); zero where there are none."""
    count = index.stop - index.start
    shape = (count, problem.H, problem.groups, problem.K, problem.V)
    if states is None:
        return np.zeros(shape, problem.state_dtype)
    S = states if problem.state_layout == "kv" else states.swapaxes(-1, -2)
    return np.array(S[index], problem.state_dtype, order="C").reshape(shape)


def advance(S, x: TokenInputs):
    """Advance contiguous states by one token, in place; return the token's r = v - S^T k, a row."""
    if x.g is not None:
        S *= np.exp(x.g)
    r = x.k @ S
    np.subtract(x.v, r, out=r)
    _add_outer(S, x.k, x.beta * r)
    return r


def read(S, q, out=None):
    """S^T q as a row, with the scale already in q."""
    return np.matmul(q, S, out=out)


def _add_outer(S, k, w) -> None:
    """S += k w^T of rows k and w, in place."""
    K, V = S.shape[-2:]
    if K * V < LARGE_STATE:
        S += k.mT * w
        return
    # In one pass over S, where the product on its own would take two and as much memory again.
    add = _GER[S.dtype]
    k = np.broadcast_to(k, (*w.shape[:-1], K)).reshape(-1, K)
    for one, row, column in zip(S.reshape(-1, K, V), w.reshape(-1, V), k, strict=True):
        add(1.0, row, column, a=one.T, overwrite_a=True)


_GER = {np.dtype(np.float32): sger, np.dtype(np.float64): dger}
