"""The gradients' kernels on the emulator: no fault, and gradients of the token loop."""

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorDevice, Run
from helpers import make_inputs
from rounded import rounded_gradients

from cupy_delta.cuda.plan import plan
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.problem import operator_problem
from cupy_delta.reference.adjoint import recurrent_delta_rule_bwd

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
NAMES = ("dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
BETAS = {"(0,1)": (0.0, 1.0), "1": (1.0, 1.0), "(0,2)": (0.0, 2.0), "1.99": (1.99, 1.99)}


def problem_of(args, kw, chunk=None, l2norm=False):
    options = dict(scale=None, qk_l2norm=l2norm, out=None) | kw
    if chunk is not None:
        options["chunk_size"] = chunk
    return operator_problem(*args, **options)


def gradients(args, kw, do, dfinal, chunk=None, run=None, l2norm=False, **facts):
    """Return the gradients by name, from the forward's residuals, all by the kernels."""
    problem = problem_of(args, kw, chunk, l2norm)
    device = EmulatorDevice(run or Run(), **facts)
    saved = execute(plan("training", problem, device.facts), vars(problem), device)
    backward = plan("backward", problem, device.facts)
    results = execute(backward, {"do": do, "dfinal_state": dfinal}, device, ready=saved)
    return {name: np.array(results[name], np.float64) for name in NAMES if name in results}


def exact(args, kw, do, dfinal, l2norm=False):
    """The float64 adjoint of the token loop, for the values that the kernels were given."""
    wide = [None if x is None else np.asarray(x, np.float64) for x in args]
    kw = dict(kw)
    states = problem_of(args, kw).state_shape
    initial = kw["initial_state"]
    kw["initial_state"] = np.zeros(states) if initial is None else initial.astype(np.float64)
    dfinal = None if dfinal is None else dfinal.astype(np.float64)
    result = recurrent_delta_rule_bwd(
        problem_of(wide, kw, l2norm=l2norm), np.asarray(do, np.float64), dfinal
    )
    return {name: x for name, x in zip(NAMES, result, strict=True) if x is not None}


def plain(args, kw, do, dfinal, chunk):
    """Gradients from products of operands rounded to the inputs' dtype."""
    found = dict(zip(NAMES, rounded_gradients(args, kw, do, dfinal, chunk), strict=True))
    return {name: x for name, x in found.items() if name != "dg" or args[4] is not None}


def error(x, y):
    """Relative Frobenius error; NaN is infinite."""
    value = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
    return np.inf if np.isnan(value) else value


def final_gradient(args, kw, seed=7):
    shape = problem_of(args, kw).state_shape
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def output_gradient(args, seed=6):
    return np.random.default_rng(seed).standard_normal(args[2].shape).astype(args[2].dtype)


# 16-bit: a few roundings of 2^-9 or 2^-12 relative to the whole array; float: 3xTF32.
BOUND = {BF16: 2e-2, F16: 3e-3, F32: 1e-5}


def check(args, kw, do, dfinal, l2norm=False, **options):
    result = gradients(args, kw, do, dfinal, l2norm=l2norm, **options)
    expected = exact(args, kw, do, dfinal, l2norm=l2norm)
    assert result.keys() == expected.keys()
    for name in expected:
        assert result[name].shape == expected[name].shape, name
        if expected[name].size:
            deviation = error(result[name], expected[name])
            assert deviation < BOUND[args[0].dtype], (name, deviation)


# K, V, T, key heads, group, chunk, dtype: each K and V, T and dtype once or more.
SHAPES = [
    (1, 17, 1, 1, 1, 16, BF16),
    (17, 1, 15, 1, 2, 16, F16),
    (40, 60, 16, 1, 1, 32, F32),
    (60, 40, 63, 2, 1, 32, BF16),
    (64, 64, 130, 1, 2, 64, BF16),
    (96, 100, 65, 1, 1, 32, F16),
    (100, 96, 64, 1, 1, 16, F32),
    (128, 128, 65, 1, 2, 32, BF16),
    (128, 128, 33, 1, 1, 16, F32),
    (192, 17, 33, 1, 1, 32, BF16),
    (17, 192, 17, 1, 1, 16, F16),
    (256, 64, 33, 1, 1, 16, F32),
    (64, 256, 33, 1, 1, 32, BF16),
    (256, 256, 17, 1, 1, 16, BF16),
]


@pytest.mark.parametrize(("K", "V", "T", "H", "G", "chunk", "dtype"), SHAPES)
def test_shapes(K, V, T, H, G, chunk, dtype):
    layout = "vk" if T % 2 else "kv"
    args, kw = make_inputs(T, H=H, G=G, K=K, V=V, dtype=dtype, initial=True, layout=layout)
    check(args, kw, output_gradient(args), final_gradient(args, kw), chunk=chunk)


# As SHAPES: K, V, T, key heads, group, chunk, dtype.
GATED = [
    (17, 1, 35, 1, 2, 16, F16),
    (60, 40, 63, 2, 1, 32, F32),
    (64, 96, 130, 1, 2, 64, BF16),
    (96, 192, 65, 1, 1, 32, BF16),
    (128, 128, 33, 1, 2, 16, F32),
    (128, 128, 65, 1, 2, 64, BF16),
    (256, 64, 33, 1, 1, 16, F16),
]


@pytest.mark.parametrize(("K", "V", "T", "H", "G", "chunk", "dtype"), GATED)
def test_shapes_with_a_gate(K, V, T, H, G, chunk, dtype):
    layout = "vk" if T % 2 else "kv"
    options = dict(dtype=dtype, initial=True, layout=layout, gate="scalar")
    args, kw = make_inputs(T, H=H, G=G, K=K, V=V, **options)
    check(args, kw, output_gradient(args), final_gradient(args, kw), chunk=chunk)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_sequences_of_zero_one_and_more_tokens(dtype, initial, final):
    ends = [0, 0, 1, 18, 18, 51, 52]
    args, kw = make_inputs(
        52, G=2, K=32, V=32, cu_seqlens=ends, initial=initial, dtype=dtype, beta=(0.0, 2.0)
    )
    dfinal = final_gradient(args, kw) if final else None
    check(args, kw, output_gradient(args), dfinal, chunk=16)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_limits_of_beta(beta):
    args, kw = make_inputs(65, K=32, V=32, beta=(beta, beta), dtype=BF16, initial=True)
    check(args, kw, output_gradient(args), final_gradient(args, kw), chunk=32)


def test_beta_zero_keeps_its_own_gradient():
    """dv vanishes where beta is zero, dbeta does not: nothing is divided by beta."""
    args, kw = make_inputs(33, K=32, V=32, dtype=F32, initial=True)
    args[3][:, ::3] = 0
    do = output_gradient(args)
    result = gradients(args, kw, do, None, chunk=16)
    expected = exact(args, kw, do, None)
    assert np.all(result["dv"][:, ::3] == 0)
    assert np.min(np.abs(expected["dbeta"][:, ::3])) > 0
    assert error(result["dbeta"][:, ::3], expected["dbeta"][:, ::3]) < BOUND[F32]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gradient_through_the_norm(dtype):
    args, kw = make_inputs(20, K=40, V=24, dtype=dtype)
    args[0], args[1] = ((3 * x.astype(np.float32)).astype(dtype) for x in args[:2])
    check(args, kw, output_gradient(args), None, l2norm=True, chunk=16)


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_plain_products_are_the_gradients_without_rounding(gate):
    options = dict(cu_seqlens=[0, 0, 1, 70], layout="vk", initial=True, gate=gate)
    args, kw = make_inputs(70, H=2, G=2, K=24, V=20, beta=(0.0, 2.0), **options)
    args[3][:, ::7] = 0
    do, dfinal = output_gradient(args), final_gradient(args, kw)
    found, expected = plain(args, kw, do, dfinal, 32), exact(args, kw, do, dfinal)
    for name in expected:
        assert error(found[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("K", [1, 64, 128, 192, 256])
@pytest.mark.parametrize("V", [1, 64, 128, 256])
def test_default_chunk_fits_the_smallest_shared_memory(dtype, K, V):
    facts = DeviceFacts(sm_count=84, shared_bytes=99 * 1024)
    problem = problem_of(*make_inputs(64, K=K, V=V, dtype=dtype))
    launches = plan("backward", problem, facts).launches
    entries = [launch.entry for launch in launches if not launch.entry.startswith("gradient_")]
    assert entries == ["backward_state", "backward_chunk"]
    assert all(launch.shared <= facts.shared_bytes for launch in launches)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta", BETAS)
def test_error_against_plain_rounded_products(correlation, beta):
    args, kw = make_inputs(128, K=64, V=64, beta=BETAS[beta], correlation=correlation, dtype=BF16)
    args[3] = args[3].astype(np.float32)
    do = output_gradient(args)
    result, expected = gradients(args, kw, do, None, chunk=32), exact(args, kw, do, None)
    rounded = plain(args, kw, do, None, 32)
    for name in expected:
        allowed = 3 * error(rounded[name], expected[name])
        assert error(result[name], expected[name]) <= allowed, (name, allowed)


@pytest.mark.parametrize("schedule", ["descending", "random"])
@pytest.mark.parametrize("completion", ["early", "either"])
def test_schedule_changes_no_bit(schedule, completion):
    args, kw = make_inputs(40, G=2, K=32, V=48, dtype=BF16, initial=True, gate="scalar")
    do, dfinal = output_gradient(args), final_gradient(args, kw)
    first = gradients(args, kw, do, dfinal, chunk=16)
    other = Run(schedule=schedule, completion=completion, preempt=30, seed=3)
    second = gradients(args, kw, do, dfinal, chunk=16, run=other)
    for name in NAMES:
        assert np.array_equal(first[name], second[name]), name
        assert first[name].any()


@pytest.mark.parametrize("gate", [None, "scalar"])
def test_nan_stays_in_its_sequence(gate):
    options = dict(cu_seqlens=[0, 19, 40], dtype=BF16, initial=True, gate=gate)
    args, kw = make_inputs(40, K=32, V=32, **options)
    do, dfinal = output_gradient(args), final_gradient(args, kw)
    clean = gradients(args, kw, do, dfinal, chunk=16)
    for x in (*args, do):
        if x is not None:
            x[:, 19:] = np.nan
    spoilt = gradients(args, kw, do, dfinal, chunk=16)
    for name in clean.keys() - {"dinitial_state"}:
        assert np.array_equal(clean[name][:, :19], spoilt[name][:, :19]), name
    assert np.array_equal(clean["dinitial_state"][0], spoilt["dinitial_state"][0])
