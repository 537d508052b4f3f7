"""Gradients: central differences check the adjoint, the adjoint the chunkwise backward."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import deviation, make_inputs, numeric_gradient

import cupy_delta as cd
from cupy_delta.problem import operator_problem
from cupy_delta.reference.adjoint import recurrent_delta_rule_bwd

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
GATES = (None, "scalar", "channel")


def problem_of(args, kw, **options):
    options = dict(scale=None, qk_l2norm=False, out=None) | kw | options
    return operator_problem(*args, **options, beta_shapes=("B T HV", "B T HV V"))


def output_gradients(args, kw, seed=5):
    rng = np.random.default_rng(seed)
    do = rng.standard_normal(args[2].shape).astype(args[2].dtype)
    final = cd.recurrent_delta_rule(*args, **kw).final_state
    return do, rng.standard_normal(final.shape).astype(final.dtype)


def adjoint_of(args, kw, do, dfinal, **options):
    return recurrent_delta_rule_bwd(problem_of(args, kw, **options), do, dfinal)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("per_value", [False, True])
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_adjoint_against_central_differences(gate, per_value, l2norm, layout):
    args, kw = make_inputs(
        4, H=1, G=2, K=3, V=2, gate=gate, beta_per_value=per_value, initial=True, layout=layout
    )
    kw = kw | {"qk_l2norm": l2norm}
    do, dfinal = output_gradients(args, kw)
    gradients = adjoint_of(args, kw, do, dfinal)

    def loss():
        o, final = cd.recurrent_delta_rule(*args, **kw)
        return np.sum(o * do) + np.sum(final * dfinal)

    for x, gradient in zip([*args, kw["initial_state"]], gradients, strict=True):
        if x is None:
            assert gradient is None
            continue
        assert deviation(gradient, numeric_gradient(loss, x)) < 1e-8


def check_chunkwise(args, kw, bound=1e-12, dfinal=True, **options):
    do, dS = output_gradients(args, kw)
    dS = dS if dfinal else None
    chunk = options.pop("chunk_size", None)
    forward = cd.chunk_delta_rule_fwd(*args, chunk_size=chunk, **kw, **options)
    plain = cd.chunk_delta_rule(*args, chunk_size=chunk, **kw, **options)
    assert np.array_equal(forward.o, plain.o)
    result = cd.chunk_delta_rule_bwd(forward.residuals, do, dS)
    expected = adjoint_of(args, kw, do, dS, **options)
    for name, x, y in zip(NAMES, result, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert deviation(x, y) < bound, name
    return result


@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [None, 16, 32, 17])
def test_chunkwise_backward(T, gate, chunk):
    args, kw = make_inputs(T, H=2, G=2, gate=gate, initial=True, beta=(0, 2))
    check_chunkwise(args, kw, chunk_size=chunk)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("options", [dict(qk_l2norm=True), dict(scale=0.0), dict(scale=-2.5)])
@pytest.mark.parametrize("dfinal", [False, True])
def test_options(gate, options, dfinal):
    args, kw = make_inputs(70, B=2, H=2, G=2, gate=gate, layout="vk", initial=dfinal)
    args[0] = 3 * args[0]
    result = check_chunkwise(args, kw, dfinal=dfinal, **options)
    assert (result.initial_state is None) == (not dfinal)


@pytest.mark.parametrize("gate", GATES)
def test_sequences_end_to_end(gate):
    cu = [0, 0, 1, 70, 70, 134, 199, 200]
    args, kw = make_inputs(200, G=2, gate=gate, cu_seqlens=cu, initial=True, beta=(0, 2))
    check_chunkwise(args, kw)


@pytest.mark.parametrize(
    ("beta", "correlation"), list(itertools.product([(0, 0), (1, 1), (2, 2)], [0, 0.9, 1]))
)
def test_hard_keys(beta, correlation):
    args, kw = make_inputs(130, K=16, V=8, beta=beta, correlation=correlation, initial=True)
    check_chunkwise(args, kw)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("decay", [20.0, 1000.0])
def test_strong_decay(gate, decay):
    args, kw = make_inputs(130, K=16, V=8, gate=gate, beta=(2, 2), initial=True)
    args[4] = np.full_like(args[4], -decay)
    result = check_chunkwise(args, kw)
    assert all(np.isfinite(x).all() for x in result)


@pytest.mark.parametrize("gate", [None, "scalar"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtypes(name, gate):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    args, kw = make_inputs(130, H=2, K=16, V=8, gate=gate, dtype=dtype, initial=True)
    args[3] = args[3].astype(np.float32)
    bound = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}[name]
    result = check_chunkwise(args, kw, bound)
    assert [x.dtype for x in result[:3]] == [dtype] * 3
    assert result.beta.dtype == np.float32
    assert result.initial_state.dtype == np.float32
    if gate:
        assert result.g.dtype == dtype


def test_nan_stays_in_its_head():
    args, kw = make_inputs(70, H=2, G=2, initial=True)
    do, dS = output_gradients(args, kw)
    clean = cd.chunk_delta_rule_bwd(cd.chunk_delta_rule_fwd(*args, **kw).residuals, do, dS)
    do[0, 30, 1] = np.nan
    dirty = cd.chunk_delta_rule_bwd(cd.chunk_delta_rule_fwd(*args, **kw).residuals, do, dS)
    assert np.isnan(dirty.v[0, :, 1]).any()
    assert np.array_equal(dirty.v[0, :, [0, 2, 3]], clean.v[0, :, [0, 2, 3]])
    assert np.array_equal(dirty.q[0, :, 1], clean.q[0, :, 1])


def test_nothing_to_do():
    args, kw = make_inputs(0, B=2, initial=True)
    do, dS = output_gradients(args, kw)
    result = cd.chunk_delta_rule_bwd(cd.chunk_delta_rule_fwd(*args, **kw).residuals, do, dS)
    assert np.array_equal(result.initial_state, dS)
    assert result.q.shape == args[0].shape
