"""`qk_l2norm` on CUDA of rows as large and as small as the dtype has, and its gradient."""

import ml_dtypes
import numpy as np
import pytest
from helpers import definition, make_inputs, normalised, normalised_gradient

import cupy_delta as cd

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BOUND = {"float64": 1e-13, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
CHUNKED = [(FLOAT32, 1e-30), (FLOAT32, 1e19), (FLOAT32, 3e38), (BFLOAT16, 1e-20), (BFLOAT16, 1e20)]
BY_TOKEN = [(FLOAT32, 3e38), (BFLOAT16, 1e20), (FLOAT64, 1e300)]


def inputs(T, dtype, size, **sizes):
    """A call with q and k of a size, but every third key of size 1."""
    args, kw = make_inputs(T, initial=True, dtype=dtype, **sizes)
    factor = np.full((1, T, 1, 1), size)
    factor[:, ::3] = 1.0
    args[0] = (args[0].astype(np.float64) * size).astype(dtype)
    args[1] = (args[1].astype(np.float64) * factor).astype(dtype)
    return args, kw


def exact(args, kw):
    q, k, *others = args
    return definition(normalised(q), normalised(k), *others, **kw)


def close(x, y, bound):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    worst = np.max(np.abs(x - y)) / np.max(np.abs(y))
    return worst < bound


@pytest.mark.parametrize(("dtype", "size"), CHUNKED)
def test_chunks(emulated, dtype, size):
    args, kw = inputs(20, dtype, size, K=24, V=16)
    for x, y in zip(cd.chunk_delta_rule(*args, qk_l2norm=True, **kw), exact(args, kw), strict=True):
        assert close(x, y, BOUND[dtype.name])


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(("dtype", "size"), BY_TOKEN)
def test_token_by_token(emulated, dtype, size, layout):
    args, kw = inputs(4, dtype, size, H=2, G=2, K=24, V=16, layout=layout)
    got = cd.recurrent_delta_rule(*args, qk_l2norm=True, **kw)
    for x, y in zip(got, exact(args, kw), strict=True):
        assert close(x, y, BOUND[dtype.name])


@pytest.mark.ptx_leg(tokens=[3])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(("dtype", "size"), BY_TOKEN)
def test_steps(emulated, dtype, size, layout, tokens):
    """Keys are shared by warps where states are (K, V), by lanes of one where they are (V, K)."""
    args, kw = inputs(tokens, dtype, size, H=2, G=2, K=64, V=64, layout=layout)
    state = kw["initial_state"].copy()
    o = cd.delta_rule_step(*args, state=state, state_layout=layout, qk_l2norm=True)
    for x, y in zip((o, state), exact(args, kw), strict=True):
        assert close(x, y, BOUND[dtype.name])


@pytest.mark.parametrize(("dtype", "size"), [(FLOAT32, 1e19), (BFLOAT16, 1e20)])
def test_gradients(emulated, dtype, size):
    args, kw = inputs(20, dtype, size, K=24, V=16)
    forward = cd.chunk_delta_rule_fwd(*args, qk_l2norm=True, **kw)
    got = cd.chunk_delta_rule_bwd(forward.residuals, forward.o)
    q, k, *others = (None if x is None else np.asarray(x, np.float64) for x in args)
    after = adjoint(normalised(q), normalised(k), *others, kw, forward.o.astype(np.float64))
    for x, dy, dx in ((q, after[0], got.q), (k, after[1], got.k)):
        # In units in which gradients of rows of all sizes are alike.
        units = np.max(np.abs(x), axis=-1, keepdims=True)
        expected = normalised_gradient(dy, x) * units
        assert close(np.asarray(dx, np.float64) * units, expected, 3 * BOUND[dtype.name])


def adjoint(q, k, v, beta, g, kw, do):
    from cupy_delta.problem import operator_problem
    from cupy_delta.reference.adjoint import recurrent_delta_rule_bwd

    options = dict(scale=None, qk_l2norm=False, out=None)
    states = kw | dict(initial_state=kw["initial_state"].astype(np.float64))
    problem = operator_problem(q, k, v, beta, g, **states, **options)
    return recurrent_delta_rule_bwd(problem, do)
