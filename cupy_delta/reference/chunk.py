"""The algebra of chunks, forward and backward, on stacks (h, G, n, C, ...).

Letters of docs/derivation.md, per chunk and head, with rows as tokens: Q (already scaled), K, V,
b = beta as a column, S the entering state, and every product of tokens i >= j carrying the
decay. `M = tril(K K^T, -1)`, `A = diag(b) M`, `Pqk = tril(Q K^T)`::

    R = V - K S          N = (I + A)^-1 (b R)
    O = Q S + Pqk N      S' = S + K^T N

The backward divides by nothing, so it is exact at beta = 0: `N = b N^` with `N^ = R - M N`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg.blas import dtrsm, strsm

from ..problem import Problem
from .decay import Decay, NoDecay, lower_triangle, make_decay, sum_before, sum_from, transpose
from .inputs import load_beta, load_gate
from .tiles import Span, l2norm, l2norm_gradient


def solve_unit_lower(A, B, *, transposed: bool = False):
    """Solve (I + tril(A, -1)) X = B, or its transpose, for stacks of matrices.

    BLAS reads only the strict lower triangle of A, and works in place on columns: X is built as a
    stack of its transposes.
    """
    Xt = np.empty((*A.shape[:-2], B.shape[-1], B.shape[-2]), A.dtype)
    Xt[...] = transpose(B)
    C, V = B.shape[-2:]
    solve = _TRSM[A.dtype]
    # A in rows is its transpose in columns.
    for a, x in zip(A.reshape(-1, C, C), Xt.reshape(-1, V, C), strict=True):
        solve(1.0, a.T, x.T, trans_a=not transposed, diag=True, overwrite_b=True)
    return transpose(Xt)


_TRSM = {np.dtype(np.float32): strsm, np.dtype(np.float64): dtrsm}


@dataclass
class Block:
    """The chunks of one span: inputs as stacks, and the products that need no state.

    q, Pqk and q_read are None where no outputs are made.
    """

    q: Any
    k: np.ndarray
    v: np.ndarray
    b: np.ndarray
    decay: Decay
    KK: np.ndarray
    A: np.ndarray
    Pqk: Any
    q_read: Any
    k_read: np.ndarray
    k_write: np.ndarray
    q_norm: tuple | None = None
    k_norm: tuple | None = None


def load_rows(problem: Problem, span: Span, x):
    """Load q or k, normalised if the problem says so: then with what the gradient needs of it."""
    x = span.key_heads(x, problem.compute_dtype)
    if not problem.qk_l2norm:
        return x, None
    norm = l2norm(x)
    return norm[0], norm


def load_decay(problem: Problem, span: Span):
    """Load what the gate does in each chunk of a span."""
    dtype, g = problem.compute_dtype, None
    if problem.gate is not None:
        # Gates are summed in float64, and loaded in it where they come as they are.
        loaded = dtype if problem.raw_gate else np.dtype(np.float64)
        g = load_gate(
            problem, lambda x: span.value_heads(x, loaded), lambda x: span.parameters(x, loaded)
        )
    return make_decay(problem.gate, g, dtype)


def load_block(problem: Problem, span: Span) -> Block:
    """Load a span; q is scaled and, like k, normalised if the problem says so."""
    dtype = problem.compute_dtype
    k, k_norm = load_rows(problem, span, problem.k)
    q, q_norm = None, None
    if problem.q is not None:
        q, q_norm = load_rows(problem, span, problem.q)
        q = q * dtype.type(problem.scale)
    decay = load_decay(problem, span)
    b = load_beta(problem, lambda x: span.value_heads(x, dtype))[..., None]
    KK = decay.pairs(k, k)
    return Block(
        q=q,
        k=k,
        v=span.value_heads(problem.v, dtype),
        b=b,
        decay=decay,
        KK=KK,
        A=b * KK,
        Pqk=None if q is None else decay.pairs(q, k),
        q_read=None if q is None else decay.read(q),
        k_read=decay.read(k),
        k_write=decay.write(k),
        q_norm=q_norm,
        k_norm=k_norm,
    )


class Trace:
    """What the backward needs of a block's forward: per chunk the entering state, R and N."""

    def __init__(self, block: Block):
        self.S: list[np.ndarray] = []
        self.R = np.empty_like(block.v)
        self.N = np.empty_like(block.v)


def forward_block(block: Block, S, o=None, trace: Trace | None = None, leave=None):
    """Walk the chunks of a block from state S; return the state after the last.

    Writes the outputs to `o` (h, G, n, C, V), and what the backward needs to `trace`, if given;
    calls `leave` with every chunk's number and the state after it.
    """
    for i in range(block.k.shape[2]):
        R = np.empty_like(block.v[:, :, i]) if trace is None else trace.R[:, :, i]
        np.matmul(block.k_read[:, :, i], S, out=R)
        np.subtract(block.v[:, :, i], R, out=R)
        N = solve_unit_lower(block.A[:, :, i], block.b[:, :, i] * R)
        if o is not None:
            np.matmul(block.q_read[:, :, i], S, out=o[:, :, i])
            o[:, :, i] += block.Pqk[:, :, i] @ N
        if trace is not None:
            trace.S.append(S)
            trace.N[:, :, i] = N
        written = transpose(block.k_write[:, :, i]) @ N
        written += block.decay.carry(S, i)
        S = written
        if leave is not None:
            leave(i, S)
    return S


@dataclass
class BlockGradients:
    """Gradients of a block's q, k (h, n, C, K), v, beta and g (h, G, n, C, ...)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    g: np.ndarray | None


def backward_block(problem: Problem, block: Block, trace: Trace, do, dS):
    """Walk the chunks backwards from dS, the gradient of the state leaving the block.

    Returns the `BlockGradients` and the gradient of the state entering the block.
    """
    dtype = problem.compute_dtype
    stack = do.shape[:-1]
    N, R = trace.N, trace.R
    dR = np.empty_like(do)
    dbeta = np.empty((*stack, 1), dtype)
    # Rows that meet the entering and the leaving state: dO S^T, dR S^T and N dS^T.
    shape = (*stack, block.k.shape[-1])
    dO_S, dR_S, N_dS = np.empty(shape, dtype), np.empty(shape, dtype), np.empty(shape, dtype)
    # Gradient of the log decay of the state carried through each chunk, per key channel.
    carried = np.empty((*stack[:3], dS.shape[-2]), dtype)
    strict = np.tri(block.k.shape[3], k=-1, dtype=dtype)
    for i in reversed(range(stack[2])):
        S, b = trace.S[i], block.b[:, :, i]
        dO = do[:, :, i]
        dN = transpose(block.Pqk[:, :, i]) @ dO + block.k_write[:, :, i] @ dS
        dY = solve_unit_lower(block.A[:, :, i], dN, transposed=True)
        dR[:, :, i] = b * dY
        N_hat = R[:, :, i] - (block.KK[:, :, i] * strict) @ N[:, :, i]
        dbeta[:, :, i] = np.sum(dY * N_hat, axis=-1, keepdims=True)
        np.matmul(dO, transpose(S), out=dO_S[:, :, i])
        np.matmul(dR[:, :, i], transpose(S), out=dR_S[:, :, i])
        np.matmul(N[:, :, i], transpose(dS), out=N_dS[:, :, i])
        through = block.decay.carry(dS, i)
        if problem.gate:
            carried[:, :, i] = np.sum(through * S, axis=-1)
        dS = through + transpose(block.q_read[:, :, i]) @ dO
        dS -= transpose(block.k_read[:, :, i]) @ dR[:, :, i]

    decay = block.decay
    dPqk = lower_triangle(do @ transpose(N))
    E = lower_triangle(dR @ transpose(N), -1)
    np.negative(E, out=E)
    dq, dk, dg = decay.pairs_gradients(dPqk, block.q, block.k, block.Pqk)
    k_late, k_early, dg_keys = decay.pairs_gradients(E, block.k, block.k, block.KK)
    q_read, k_read, k_write = decay.read(dO_S), decay.read(dR_S), decay.write(N_dS)
    if not isinstance(decay, NoDecay):
        dg += dg_keys
        dg += sum_from(decay.per_gate(block.q * q_read - block.k * k_read))
        dg += sum_before(decay.per_gate(block.k * k_write))
        dg += decay.per_gate(carried[:, :, :, None])
    dq += q_read
    dk += k_late
    dk += k_early
    dk -= k_read
    dk += k_write
    gradients = BlockGradients(
        q=_through_norm(dq.sum(axis=1) * dtype.type(problem.scale), block.q_norm),
        k=_through_norm(dk.sum(axis=1), block.k_norm),
        v=dR,
        beta=dbeta[..., 0],
        g=dg[..., 0] if problem.gate == "scalar" else dg,
    )
    return gradients, dS


def _through_norm(dy, norm):
    """Gradient before `l2norm`, from that after it; `norm` is its result, or None without it."""
    return dy if norm is None else l2norm_gradient(dy, *(x[:, 0] for x in norm))
