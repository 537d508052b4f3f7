"""Inputs for tests, and the definition written once more, as plainly as it can be."""

from __future__ import annotations

import itertools

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_inputs(
    T,
    *,
    B=1,
    H=1,
    G=1,
    K=5,
    V=7,
    gate=None,
    decay=0.3,
    beta=(0.0, 1.0),
    beta_per_value=False,
    correlation=0.0,
    initial=False,
    cu_seqlens=None,
    layout="kv",
    dtype=np.float64,
    seed=0,
):
    """Return (args, kwargs) of an operator: unit keys, with `correlation` to a common direction."""
    rng = np.random.default_rng(seed)
    HV = H * G
    if cu_seqlens is not None:
        cu_seqlens = np.asarray(cu_seqlens)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    q = unit(rng.standard_normal((B, T, H, K)))
    k = rng.standard_normal((B, T, H, K))
    k = unit(np.sqrt(correlation) * rng.standard_normal(K) + np.sqrt(1 - correlation) * k)
    v = rng.standard_normal((B, T, HV, V))
    b = rng.uniform(*beta, (B, T, HV, V) if beta_per_value else (B, T, HV))
    g = None
    if gate is not None:
        g = -decay * rng.exponential(size=(B, T, HV, K) if gate == "channel" else (B, T, HV))
        g = g.astype(dtype)
    states = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    S0 = rng.standard_normal((N, HV, K, V) if layout == "kv" else (N, HV, V, K))
    args = [*(x.astype(dtype) for x in (q, k, v, b)), g]
    kwargs = dict(cu_seqlens=cu_seqlens, state_layout=layout)
    kwargs["initial_state"] = S0.astype(states) if initial else None
    return args, kwargs


def definition(q, k, v, beta, g=None, *, initial_state, cu_seqlens, state_layout, scale=None):
    """The delta rule in float64, one token of one head at a time, from the equations alone."""
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q, k, v, beta))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        spans = [(0, int(a), int(z)) for a, z in itertools.pairwise(cu_seqlens)]
    o, final = np.zeros_like(v), np.zeros((len(spans), HV, K, V))
    for n, (b, start, stop) in enumerate(spans):
        for hv in range(HV):
            h = hv // (HV // H)
            S = np.zeros((K, V))
            if initial_state is not None:
                S = np.asarray(initial_state[n, hv], np.float64)
                S = S if state_layout == "kv" else S.T
            for t in range(start, stop):
                if g is not None:
                    decay = np.exp(np.asarray(g[b, t, hv], np.float64))
                    S = (decay if decay.ndim == 0 else decay[:, None]) * S
                r = v[b, t, hv] - S.T @ k[b, t, h]
                S = S + np.outer(k[b, t, h], beta[b, t, hv] * r)
                o[b, t, hv] = scale * S.T @ q[b, t, h]
            final[n, hv] = S
    return o, final if state_layout == "kv" else final.swapaxes(-1, -2)


def deviation(x, y):
    """Largest difference, against the largest value of y (at least 1); NaN never passes."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert x.shape == y.shape
    if y.size == 0:
        return 0.0
    worst = np.max(np.abs(x - y)) / max(1.0, np.max(np.abs(y)))
    return np.inf if np.isnan(worst) else float(worst)


def numeric_gradient(loss, x, h=1e-5):
    """Central differences of a function without arguments, which reads the array x."""
    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + h
        high = loss()
        x[index] = value - h
        low = loss()
        x[index] = value
        numeric[index] = (high - low) / (2 * h)
    return numeric


def normalised(x):
    """What `qk_l2norm` makes of rows, in float64, whatever their size."""
    x = np.asarray(x, np.float64)
    size = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), 1.0)
    return x / size / np.sqrt(np.sum((x / size) ** 2, axis=-1, keepdims=True) + 1e-6 / size / size)


def normalised_gradient(dy, x):
    """Gradient of x, from that of `normalised(x)`."""
    x, y = np.asarray(x, np.float64), normalised(x)
    size = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), 1.0)
    length = np.sqrt(np.sum((x / size) ** 2, axis=-1, keepdims=True) + 1e-6 / size / size)
    return (dy - y * np.sum(y * dy, axis=-1, keepdims=True)) / length / size
