"""A plain chunkwise evaluation with operands rounded to a dtype: what kernels are judged by."""

from itertools import pairwise

import numpy as np


def rounded_products(args, kw, chunk):
    """Return (o, final_state) from products of operands rounded to the inputs' dtype.

    float32 sums and everything else in float64, the inverse exact; outputs rounded once.
    """
    dtype = args[0].dtype
    q, k, v, beta = (np.asarray(x, np.float64) for x in args[:4])
    g = None if args[4] is None else np.maximum(np.asarray(args[4], np.float64), -1000)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    cu = kw["cu_seqlens"]
    spans = [(b, 0, T) for b in range(B)]
    if cu is not None:
        spans = [(0, int(a), int(z)) for a, z in pairwise(cu)]

    def mul(a, b):
        return a.astype(dtype).astype(np.float64) @ b.astype(dtype).astype(np.float64)

    o, final = np.zeros(v.shape), np.zeros((len(spans), HV, K, V))
    for n, (b, start, stop) in enumerate(spans):
        for hv in range(HV):
            h = hv // (HV // H)
            S = np.zeros((K, V))
            if kw["initial_state"] is not None:
                S = np.asarray(kw["initial_state"][n, hv], np.float64)
                S = S if kw["state_layout"] == "kv" else S.T
            for first in range(start, stop, chunk):
                rows = slice(first, min(first + chunk, stop))
                Q, X, W, c = q[b, rows, h], k[b, rows, h], v[b, rows, hv], beta[b, rows, hv, None]
                G = np.cumsum(g[b, rows, hv]) if g is not None else np.zeros(len(X))
                D = np.exp(np.where(np.tri(len(X)) > 0, G[:, None] - G[None], -np.inf))
                M = np.tril(mul(X, X.T) * D, -1)
                core = -M @ np.linalg.inv(np.eye(len(X)) + c * M)
                R = W - np.exp(G)[:, None] * mul(X, S)
                N = c * (R + mul(core, c * R))
                P = np.tril(mul(Q, X.T) * D)
                o[b, rows, hv] = K**-0.5 * (np.exp(G)[:, None] * mul(Q, S) + mul(P, N))
                S = np.exp(G[-1]) * S + mul(X.T, np.exp(G[-1] - G)[:, None] * N)
            final[n, hv] = S
    if kw["state_layout"] == "vk":
        final = final.swapaxes(-1, -2)
    return o.astype(dtype).astype(np.float64), final


def error(x, y):
    """Relative error in the Frobenius norm; NaN is infinite."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    value = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
    return np.inf if np.isnan(value) else float(value)


def twice(plain, exact):
    """Return a bound: twice the error of the plain evaluation, which must be finite itself."""
    bound = 2 * error(plain, exact) + 1e-7
    assert np.isfinite(bound)
    return bound


def wide(args, kw):
    """Return the call's arguments in float64."""
    args = [None if x is None else x.astype(np.float64) for x in args]
    initial = kw["initial_state"]
    return args, kw | {"initial_state": None if initial is None else initial.astype(np.float64)}
