"""Adaptive filters as the delta rule: which arguments make which filter.

A filter of n taps keeps weights w, predicts y_t = w^T x_t from the regressor x_t, and corrects w by
the error of that prediction::

    e_t = d_t - y_t,   w <- w + beta_t e_t x_t

That is one token of the delta rule with the weights as its state (K = n, V = 1), keys k_t = x_t,
values v_t = d_t and

======  ============================  ================================
filter  beta_t                        g_t
======  ============================  ================================
LMS     mu                            none, or log(1 - leakage): leaky
NLMS    mu / (eps + x_t^T x_t)        the same
======  ============================  ================================

so that step sizes 0 < mu < 2 of NLMS are 0 < beta < 2 for keys of unit length, the stable range of
the delta rule. A leak comes first: it is the decayed weights whose error is taken and corrected.

V > 1 is several desired signals with one regressor, value heads are several filters side by side on
one regressor, each with its own step size. Complex signals, and filters that keep more than weights
(RLS and Kalman filters with their n x n matrix), are no delta rule and out of scope.
"""

from __future__ import annotations

import numpy as np

from cupy_delta import chunk_delta_rule


def regressors(signal, taps: int):
    """Return the `taps` samples up to each one, newest first and zero before the first, (T, n)."""
    padded = np.concatenate([np.zeros(taps - 1, signal.dtype), signal])
    return np.lib.stride_tricks.sliding_window_view(padded, taps)[:, ::-1]


def nlms_step(x, mu, eps: float):
    """Return beta of NLMS for regressors (T, n) and step sizes (M,), as (T, M)."""
    return np.asarray(mu) / (eps + np.sum(x * x, axis=1, keepdims=True))


def adapt(x, d, beta, g=None, weights=None, asarray=np.asarray):
    """Run M filters on one regressor, and predict each sample before it is learned.

    Outputs of the delta rule are read after the write: with k_t as its own query, o_t would be the
    prediction *after* the correction (a posteriori). The prediction before it (a priori) of token
    t + 1 is what token t's state gives for x_{t+1}: so the query of each token is the next one's
    regressor, and the first prediction is read from the weights that came in.

    Parameters
    ----------
    x : array, (T, n)
        Regressors.
    d : array, (T, V)
        Desired signals.
    beta : array, (T, M)
        Steps, see the table above.
    g : array, (T, M), optional
        Logarithms of the leaks.
    weights : array, (1, M, n, V), optional
        Where to go on; what an earlier call returned.
    asarray : callable
        Puts an array where the filters shall run: ``numpy.asarray`` or ``cupy.asarray``.

    Returns
    -------
    predicted : array, (T, M, V)
        A priori, from the samples before each.
    weights : array, (1, M, n, V)
        After the last sample, of the kind that `asarray` makes.
    """
    x, d, beta = (np.ascontiguousarray(a) for a in (x, d, beta))
    T, M, V = len(x), beta.shape[1], d.shape[1]
    following = np.concatenate([x[1:], np.zeros_like(x[:1])])
    values = np.broadcast_to(d[:, None], (T, M, V))
    o, final = chunk_delta_rule(
        asarray(following[None, :, None]),
        asarray(x[None, :, None]),
        asarray(np.ascontiguousarray(values[None])),
        asarray(beta[None]),
        None if g is None else asarray(np.ascontiguousarray(g)[None]),
        scale=1.0,
        initial_state=weights,
    )
    first = np.zeros((M, V))
    if weights is not None:
        decay = 1.0 if g is None else np.exp(g[0])[:, None]
        first = decay * np.einsum("n,mnv->mv", x[0], host(weights)[0])
    shifted = host(o)[0, :-1]
    if g is not None:
        # Between a token's read and the next one's error lies the next one's decay.
        shifted = np.exp(g[1:])[:, :, None] * shifted
    return np.concatenate([first[None], shifted]), final


def host(x) -> np.ndarray:
    """Return a NumPy or CuPy array as a NumPy array."""
    return x if isinstance(x, np.ndarray) else x.get()
