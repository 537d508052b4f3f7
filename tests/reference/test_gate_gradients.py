"""The gradient of the gate, token by token: small ones are not noise, those of a reset are zero."""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta.problem import operator_problem
from cupy_delta.reference.adjoint import recurrent_delta_rule_bwd

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "bfloat16")}
DTYPES |= {"float64": np.dtype(np.float64), "float16": np.dtype(np.float16)}
RESETS = {3: -20.0, 40: -np.inf, 63: -1000.0, 64: -88.0, 65: -np.inf, 100: -np.inf, 101: -20.0}
PATTERNS = [0.01, 0.1, 1.0, 5.0, "constant 20", "constant inf", "resets", "reset of the first"]


def gates(pattern, shape):
    """(..., token, head) or (..., token, head, channel): means, constants, resets among memory."""
    g = -np.random.default_rng(3).exponential(size=shape)
    if isinstance(pattern, float):
        return pattern * g
    if pattern.startswith("constant"):
        return np.full(shape, -float(pattern.split()[1]))
    g *= 0.01
    for token, value in RESETS.items() if pattern == "resets" else [(0, -np.inf)]:
        g[:, token] = value
    return g


def errors(gate, pattern, name, chunk, *, initial=True, T=130):
    """Return (dg, error, norm): the last two per token, over heads and channels."""
    dtype = DTYPES[name]
    args, kw = make_inputs(
        T, H=2, G=4, K=16, V=8, gate=gate, beta=(0, 2), initial=initial, dtype=dtype
    )
    args[4] = gates(pattern, args[4].shape).astype(dtype)
    states = np.float64 if name == "float64" else np.float32
    rng = np.random.default_rng(5)
    do = rng.standard_normal(args[2].shape).astype(dtype)
    dfinal = rng.standard_normal((1, 8, 16, 8)).astype(states)
    forward = cd.chunk_delta_rule_fwd(*args, chunk_size=chunk, **kw)
    dg = cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal).g
    assert dg.dtype == dtype
    exact_args = [x.astype(np.float64) for x in args]
    if initial:
        kw["initial_state"] = kw["initial_state"].astype(np.float64)
    problem = operator_problem(*exact_args, **kw, scale=None, qk_l2norm=False, out=None)
    exact = recurrent_delta_rule_bwd(problem, do.astype(np.float64), dfinal.astype(np.float64))[
        4
    ].reshape(T, -1)
    got = dg.astype(np.float64).reshape(T, -1)
    return dg[0], np.max(np.abs(got - exact), axis=1), np.max(np.abs(exact), axis=1)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("chunk", [None, 16])
def test_every_token(gate, pattern, name, chunk):
    dg, error, norm = errors(gate, pattern, name, chunk)
    stored, single = ml_dtypes.finfo(DTYPES[name]), ml_dtypes.finfo(np.float32)
    # What the arithmetic leaves, what the dtype of g can hold, and where their ranges end.
    bound, floor = 1e-11, 0.0
    if name != "float64":
        bound = 2e-5 if name == "float32" else 2e-5 + float(stored.eps)
        floor = max(1e4 * float(single.smallest_subnormal), float(stored.smallest_subnormal))
    assert np.all(error <= bound * norm + floor)
    resets = np.isneginf(gates(pattern, (1, len(dg), 1))[0, :, 0])
    assert not dg[resets].any()


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_the_first_gate_has_nothing_to_decay(gate):
    dg, _, _ = errors(gate, 0.1, "float32", None, initial=False)
    assert not dg[0].any()
    assert dg[1].any()
