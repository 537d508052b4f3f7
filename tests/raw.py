"""Raw gates and strengths for tests, and what they are in float64, from the formulas alone."""

from __future__ import annotations

import numpy as np

import cupy_delta as cd

GATES = ("softplus", "sigmoid")
# (gate, shape of dt_bias): every way in which a gate is given.
FORMS = [("scalar", None), ("scalar", "head"), ("channel", None), ("channel", "head")]
FORMS += [("channel", "channel")]


def raw_gate(rng, formula, gate, bias, B, T, HV, K, dtype, size=2.0, bound=-5.0, **parameters):
    """Return a gate; `parameters` may say another dtype of A_log and dt_bias."""
    other = parameters.get("parameters", dtype)
    channels = (K,) if gate == "channel" else ()
    a = (size * rng.standard_normal((B, T, HV, *channels))).astype(dtype)
    A_log = rng.standard_normal(HV).astype(other)
    shapes = {None: None, "head": (HV,), "channel": (HV, K)}
    dt_bias = None if bias is None else rng.standard_normal(shapes[bias]).astype(other)
    if formula == "softplus":
        return cd.SoftplusGate(a, A_log, dt_bias)
    return cd.SigmoidGate(a, A_log, dt_bias, bound=bound)


def exact_gate(gate):
    """Return (g, dg/dx, dg/dA_log) in float64; overflow in exp means what it should."""
    a, A = np.asarray(gate.a, np.float64), np.exp(np.asarray(gate.A_log, np.float64))
    bias = 0.0 if gate.dt_bias is None else np.asarray(gate.dt_bias, np.float64)
    if a.ndim == 4:
        A = A[:, None]
        bias = bias[:, None] if np.ndim(bias) == 1 else bias
    x = a + bias
    with np.errstate(over="ignore"):
        if isinstance(gate, cd.SoftplusGate):
            g = -A * np.logaddexp(0, x)
            return g, -A / (1 + np.exp(-x)), g
        s, slope = 1 / (1 + np.exp(-A * x)), 1 / (1 + np.exp(-A * x)) / (1 + np.exp(A * x))
        by_A_log = np.where(slope == 0, 0, slope * A * np.where(slope == 0, 0, x))
        return gate.bound * s, gate.bound * slope * A, gate.bound * by_A_log


def exact_beta(beta):
    """Return (beta, dbeta/dlogits) in float64."""
    x = np.asarray(beta.logits, np.float64)
    with np.errstate(over="ignore"):
        s, rest = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    return beta.scale * s, beta.scale * s * rest


def carried_back(gate, dg):
    """Return the gradients of a, A_log and dt_bias in float64, from that of g."""
    _, by_x, by_A_log = exact_gate(gate)
    dg = np.asarray(dg, np.float64)
    dx, dA = dg * by_x, dg * by_A_log
    channels = tuple(range(3, dx.ndim))
    ddt_bias = None
    if gate.dt_bias is not None:
        ddt_bias = dx.sum(axis=(0, 1) if np.ndim(gate.dt_bias) == 2 else (0, 1, *channels))
    return dx, dA.sum(axis=(0, 1, *channels)), ddt_bias


def both(x):
    """Return what is given in the place of beta and g, as plain arrays in float64."""
    return exact_beta(x)[0] if isinstance(x, cd.SigmoidBeta) else exact_gate(x)[0]
