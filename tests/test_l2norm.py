"""`qk_l2norm` of rows as large and as small as the dtype has, and its gradient."""

import ml_dtypes
import numpy as np
import pytest
from helpers import definition, make_inputs, normalised, normalised_gradient

import cupy_delta as cd

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {
    np.dtype(np.float64): (1e-300, 1e-160, 1e-3, 1.0, 1e153, 1e154, 1e160, 1e307),
    np.dtype(np.float32): (1e-40, 1e-20, 1e-3, 1.0, 1e18, 1e19, 1e20, 1e30, 1e38),
    np.dtype(np.float16): (1e-7, 1e-3, 1.0, 2e4),
    BFLOAT16: (1e-38, 1e-20, 1e-3, 1.0, 1e18, 1e19, 1e25, 1e38),
}
BOUND = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


def inputs(dtype, size):
    """A call with q and k of a size, every third key of size 1; and the keys as they are."""
    args, kw = make_inputs(40, H=2, G=2, K=8, V=6, initial=True, dtype=dtype)
    factor = np.full((1, 40, 1, 1), size)
    factor[:, ::3] = 1.0
    args[0] = (args[0].astype(np.float64) * size).astype(dtype)
    args[1] = (args[1].astype(np.float64) * factor).astype(dtype)
    return args, kw


def exact(args, kw):
    q, k, *others = args
    return definition(normalised(q), normalised(k), *others, **kw)


def error(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    worst = np.max(np.abs(x - y)) / np.max(np.abs(y))
    return np.inf if np.isnan(worst) else worst


@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_outputs(operator, dtype, size):
    args, kw = inputs(dtype, size)
    for x, y in zip(operator(*args, qk_l2norm=True, **kw), exact(args, kw), strict=True):
        assert error(x, y) < BOUND[dtype.name]


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_a_step(dtype, size):
    args, kw = inputs(dtype, size)
    o, final = exact([x if x is None else x[:, :8] for x in args], kw)
    state = kw["initial_state"].copy()
    step = [x if x is None else x[:, :8] for x in args]
    assert error(cd.delta_rule_step(*step, state=state, qk_l2norm=True), o) < BOUND[dtype.name]
    assert error(state, final) < BOUND[dtype.name]


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_gradients(dtype, size):
    args, kw = inputs(dtype, size)
    forward = cd.chunk_delta_rule_fwd(*args, qk_l2norm=True, **kw)
    got = cd.chunk_delta_rule_bwd(forward.residuals, forward.o)
    q, k, *others = (None if x is None else np.asarray(x, np.float64) for x in args)
    kw["initial_state"] = kw["initial_state"].astype(np.float64)
    wide = cd.chunk_delta_rule_fwd(normalised(q), normalised(k), *others, **kw)
    after = cd.chunk_delta_rule_bwd(wide.residuals, forward.o.astype(np.float64))
    for name, x in (("q", q), ("k", k)):
        # In units in which gradients of rows of all sizes are alike.
        units = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), 1e-3)
        expected = normalised_gradient(getattr(after, name), x) * units
        found = np.asarray(getattr(got, name), np.float64) * units
        smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal) * np.max(units)
        bound = 2 * BOUND[dtype.name] * np.max(np.abs(expected)) + smallest
        assert np.max(np.abs(found - expected)) < bound


def test_rows_beside_large_ones_keep_every_bit():
    args, kw = inputs(np.float32, 1.0)
    before = cd.chunk_delta_rule(*args, qk_l2norm=True, **kw).o
    args[0][:, 20:] *= np.float32(1e25)
    args[1][:, 30:] *= np.float32(1e25)
    after = cd.chunk_delta_rule(*args, qk_l2norm=True, **kw).o
    assert np.array_equal(before[:, :20], after[:, :20])
