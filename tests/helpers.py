"""Random problems, and the one way of measuring an error, for every test."""

import numpy as np


def random_inputs(
    B=1,
    T=1,
    H=1,
    HV=None,
    K=4,
    V=None,
    *,
    gate=None,
    correlation=0.0,
    beta=(0.0, 1.0),
    decay=1.0,
    N=None,
    dtype=np.float64,
    seed=0,
):
    """Return q, k, v, beta, g and initial_state as a dict of keyword arguments.

    Keys have unit length; `correlation` is the expected cosine between any two of them, since
    like keys are what makes the triangular solve hard. `gate` is None, "scalar" or "channel",
    with log decays from 0 to about -3 times `decay`; `N` is the number of initial states (0: no
    initial state), B by default. States are float32 unless `dtype` is float64.
    """
    HV, V = HV or H, V or K
    N = B if N is None else N
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((B, 1, H, K))
    k = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.standard_normal((B, T, H, K))
    k /= np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-300)
    gates = {None: None, "scalar": (B, T, HV), "channel": (B, T, HV, K)}[gate]
    arrays = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": k,
        "v": rng.standard_normal((B, T, HV, V)),
        "beta": rng.uniform(*beta, (B, T, HV)),
        "g": None if gates is None else -decay * rng.exponential(0.6, gates),
    }
    arrays = {name: None if x is None else x.astype(dtype) for name, x in arrays.items()}
    state = rng.standard_normal((N, HV, K, V)) if N else None
    wide = dtype if np.dtype(dtype).name == "float64" else np.float32
    return arrays | {"initial_state": None if state is None else state.astype(wide)}


def error(got, expected) -> float:
    """Largest difference, relative to the largest expected magnitude (or to 1, if smaller)."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    if not got.size:
        return 0.0
    return float(np.max(np.abs(got - expected)) / max(1.0, np.max(np.abs(expected))))


def same_bits(x, y) -> bool:
    """Whether two arrays are equal in dtype, shape and every bit."""
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def tokens(arrays, start, stop):
    """The same inputs, tokens [start, stop) only; the initial state stays."""
    return {
        name: x[:, start:stop] if x is not None and name != "initial_state" else x
        for name, x in arrays.items()
    }


def without_state(arrays):
    """The same inputs with no initial state."""
    return arrays | {"initial_state": None}
