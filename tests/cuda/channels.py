"""A gate per key channel for tests: its factors in float64, and gates of every strength."""

from itertools import pairwise

import numpy as np
from helpers import make_inputs

from cupy_delta.problem import Problem

GIVEN = ("q", "k", "v", "beta", "g")
ROWS = ("k_read", "q_read", "k_write")


def make_case(T, chunk, *, H=1, G=1, K=16, V=8, dtype, **options):
    """Return a problem and its arrays, as the kernel is given them."""
    options = dict(gate="channel") | options
    args, kw = make_inputs(T, H=H, G=G, K=K, V=V, dtype=dtype, **options)
    q, k, v, beta, g = args
    cu = kw["cu_seqlens"]
    cu = None if cu is None else np.asarray(cu, np.int64)
    N = len(q) if cu is None else len(cu) - 1
    call = dict(dtype=dtype, B=len(q), T=T, N=N, H=H, HV=H * G, K=K, V=V, gate="channel")
    p = Problem(kind="numpy", **call, cu_seqlens=cu, varlen=cu is not None, chunk_size=chunk)
    beta, g = beta.astype(np.float32), g.astype(np.float32)
    return p, dict(q=q, k=k, v=v, beta=beta, g=g)


def chunks(p):
    """Slot, batch row and rows of tokens of every chunk."""
    C, spans = p.chunk_size, [(b, 0, p.T, b * p.chunk_slots(p.chunk_size)) for b in range(p.B)]
    if p.cu_seqlens is not None:
        ends = enumerate(pairwise(map(int, p.cu_seqlens)))
        spans = [(0, start, stop, start // C + n) for n, (start, stop) in ends]
    for b, start, stop, slot in spans:
        for i, first in enumerate(range(start, stop, C)):
            yield slot + i, b, slice(first, min(first + C, stop))


def factors_of(p, arrays):
    """Return the arrays of all factors by name."""
    q, k, v, beta, g = (np.asarray(arrays[name], np.float64) for name in GIVEN)
    C = p.chunk_size
    sizes = {"core": C, "p": C, "t": C, "w": p.K, "u": p.V} | dict.fromkeys(ROWS, p.K)
    found = {name: np.zeros((*p.token_shape, size)) for name, size in sizes.items()}
    found["channel_decays"] = np.full((p.B * p.chunk_slots(C), p.HV, p.K), np.nan)
    for slot, b, rows in chunks(p):
        n = rows.stop - rows.start
        for hv in range(p.HV):
            h, at = hv // p.groups, (b, rows, hv)
            Q, X, V, weight = q[b, rows, h], k[b, rows, h], v[at], beta[at][:, None]
            G = np.cumsum(np.maximum(g[at], -1000), axis=0)
            D = np.exp(np.minimum(G[:, None] - G[None], 0))
            M = np.tril(np.einsum("ic,jc,ijc->ij", X, X, D), -1)
            inverse = np.linalg.inv(np.eye(n) + weight * M)
            t = inverse * weight.T
            here = {"k_read": np.exp(G) * X, "q_read": np.exp(G) * Q}
            here |= {"k_write": np.exp(G[-1] - G) * X, "core": -M @ inverse, "t": t}
            here |= {"p": np.tril(np.einsum("ic,jc,ijc->ij", Q, X, D))}
            here |= {"w": t @ here["k_read"], "u": t @ V}
            for name, x in here.items():
                found[name][at][:, : x.shape[1]] = x
            found["channel_decays"][slot, hv] = np.exp(G[-1])
    return found


def patterns(T, K):
    """Return gates of T tokens and K channels by name."""
    rng = np.random.default_rng(3)
    found = {f"mean {mean}": -mean * rng.exponential(size=(T, K)) for mean in (0.01, 0.1, 1, 5)}
    found["bound -5"] = -5 / (1 + np.exp(-4 * rng.standard_normal((T, K))))
    found["some channels forget"] = g = -0.01 * rng.exponential(size=(T, K))
    g[:, ::3] = -20
    for reset in (-20, -88, -1000, -np.inf):
        found[f"single resets of {reset}"] = g = -0.01 * rng.exponential(size=(T, K))
        for token in (0, 15, 16, 31, 32, 40):
            g[token, token % K] = reset
            g[token, :: token % 5 + 2] = reset
    found["all forgotten"] = np.full((T, K), -np.inf)
    return found
