"""Raw gates and strengths on CuPy arrays: the kernels alone, and by the whole way of a call."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice
from helpers import deviation
from raw import both, carried_back, exact_beta, exact_gate, raw_gate

import cupy_delta as cd
from cupy_delta.cuda.plan import made, plan_with_residuals
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import DeviceFacts, Plan
from cupy_delta.cuda.tokens.raw import raw_gate_launch, through_raw
from cupy_delta.problem import operator_problem

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
A100, H200 = DeviceFacts(108, 163 * 1024), DeviceFacts(132, 227 * 1024, (9, 0))
UNIT = {F64: 2**-53, F32: 2**-24, F16: 2**-11, BF16: 2**-8}


def problem_of(q, k, v, beta, g, **options):
    options = dict(scale=None, initial_state=None, cu_seqlens=None, out=None) | options
    return operator_problem(q, k, v, beta, g, qk_l2norm=True, state_layout="kv", **options)


def inputs(formula, gate, bias, dtype, *, B=1, T=70, H=1, HV=2, K=16, V=16, **options):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K)).astype(dtype)
    v = rng.standard_normal((B, T, HV, V)).astype(dtype)
    beta = cd.SigmoidBeta(rng.standard_normal((B, T, HV)).astype(dtype), scale=2)
    return [q, k, v, beta, raw_gate(rng, formula, gate, bias, B, T, HV, K, dtype, **options)]


# ---- the kernels alone ---------------------------------------------------------------------------

# (formula, gate, bias, dtype, B, T, HV, K): odd and even rows of gates, one run of tokens or more.
SHAPES = [
    ("softplus", "scalar", None, F64, 1, 1, 1, 1),
    ("softplus", "scalar", "head", BF16, 2, 260, 6, 1),
    ("sigmoid", "scalar", "head", F32, 1, 0, 2, 1),
    ("sigmoid", "channel", None, F16, 1, 20, 3, 5),
    ("softplus", "channel", "head", F32, 1, 270, 2, 40),
    ("softplus", "channel", "channel", F32, 1, 270, 2, 40),
    ("sigmoid", "channel", "channel", BF16, 1, 90, 5, 128),
    ("sigmoid", "channel", "channel", F64, 1, 3, 2, 1),
    ("softplus", "channel", "channel", BF16, 1, 3, 2, 1),
]


def call_and_gate(shape):
    formula, gate, bias, dtype, B, T, HV, K = shape
    q, k, v, beta, g = inputs(formula, gate, bias, dtype, B=B, T=T, HV=HV, K=K, V=1, size=8.0)
    return problem_of(q, k, v, both(beta).astype(dtype), g), g


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_are_formed(leg, shape):
    problem, gate = call_and_gate(shape)
    real = problem.compute_dtype
    launch = raw_gate_launch(problem, real)
    plan = Plan((launch,), {"g": (gate.a.shape, real)}, sums=real)
    g = execute(plan, vars(problem), EmulatorDevice(leg=leg))["g"]
    exact, *_ = exact_gate(gate)
    # The logits and the exponent A_log have errors of their own in float.
    bound = 16 * UNIT[real] * (1 + np.abs(np.asarray(gate.a, np.float64)))
    assert g.dtype == real
    assert np.all(np.abs(g - exact) <= bound * np.abs(exact) + np.finfo(real).tiny)


def given_dg(plan):
    """Take dg as given, not made."""
    return replace(plan, workspace={n: x for n, x in plan.workspace.items() if n != "dg"})


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] != F64], ids=str)
def test_gradients_go_back_and_are_added_up(leg, shape):
    problem, gate = call_and_gate(shape)
    dg = np.random.default_rng(1).standard_normal(gate.a.shape).astype(np.float32)
    plan = given_dg(through_raw(Plan((), {"dg": (dg.shape, F32)}), problem))
    results = execute(plan, vars(problem) | {"dg": dg}, EmulatorDevice(leg=leg))
    exact = carried_back(gate, dg)
    unit = UNIT[problem.raw_gate.dtype]
    assert results["da"].dtype == problem.raw_gate.dtype
    error = np.abs(np.asarray(results["da"], np.float64) - exact[0])
    assert np.all(error <= (unit + 1e-5) * np.abs(exact[0]) + 1e-7)
    assert deviation(results["dA_log"], exact[1]) <= 1e-5
    if gate.dt_bias is not None:
        assert deviation(results["ddt_bias"], exact[2]) <= 1e-5


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_logits_of_any_size(leg):
    """Infinite ones too: gates stay numbers, what they forget by has no gradient."""
    a = np.array([0, 1e-3, 1, 17, 80, 200, 1e4, 3e38, np.inf], np.float32)
    a = np.concatenate([-a, a]).reshape(1, -1, 1)
    x = np.ones((1, a.size, 1, 1), np.float32)
    for cls in (cd.SoftplusGate, cd.SigmoidGate):
        gate = cls(a, np.zeros(1, np.float32))
        problem = problem_of(x, x, x, np.ones((1, a.size, 1), np.float32), gate)
        dg = np.where(np.isinf(a) & (a > 0), 0, 1).astype(np.float32)
        forms = Plan((raw_gate_launch(problem, F32),), {"g": (a.shape, F32), "dg": (a.shape, F32)})
        plan = given_dg(through_raw(forms, problem))
        results = execute(plan, vars(problem) | {"dg": dg}, EmulatorDevice(leg=leg))
        exact, by_x, _ = exact_gate(gate)
        np.testing.assert_allclose(results["g"], exact, rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(results["da"], by_x * dg, rtol=1e-6, atol=1e-37)
        terms = carried_back(replace(gate, a=np.where(dg == 0, 0, a)), dg)[1]  # not 0 Inf
        np.testing.assert_allclose(results["dA_log"], terms, rtol=1e-6, atol=1e-6)


# ---- by the whole way of a call ------------------------------------------------------------------

# Compute capability, dtype, formula, gate and dt_bias: of the ways of a backward every one.
WAYS = [
    (80, BF16, "softplus", "scalar", "head"),
    (80, F32, "sigmoid", "scalar", None),
    (80, F16, "softplus", "scalar", None),
    (90, BF16, "sigmoid", "scalar", "head"),
    (90, F16, "softplus", "scalar", "head"),
    (80, BF16, "softplus", "channel", "channel"),
]


@pytest.mark.parametrize(("sm", "dtype", "formula", "gate", "bias"), WAYS)
def test_outputs_and_gradients_are_those_of_the_arrays(emulated, sm, dtype, formula, gate, bias):
    emulated(**(HOPPER if sm == 90 else {}))
    args = inputs(formula, gate, bias, dtype)
    results = []
    for some in (args, [*args[:3], *(both(x).astype(np.float32) for x in args[3:])]):
        o, final, residuals = cd.chunk_delta_rule_fwd(*some, qk_l2norm=True)
        plain = cd.chunk_delta_rule(*some, qk_l2norm=True)
        results.append((o, final, *plain, cd.chunk_delta_rule_bwd(residuals, o, final)))
    unit = 2 * UNIT[dtype] + 1e-5
    (*outputs, found), (*wanted, expected) = results
    for x, y in zip((*outputs, *found[:3]), (*wanted, *expected[:3]), strict=True):
        assert x.dtype == y.dtype and deviation(x, y) <= unit
    for x, y in zip(found.g, carried_back(args[4], expected.g), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == dtype and deviation(x, y) <= unit
    exact = np.asarray(expected.beta, np.float64) * exact_beta(args[3])[1]
    assert found.beta.logits.dtype == dtype and deviation(found.beta.logits, exact) <= unit


def test_parameters_of_more_heads_than_form_gates_together(emulated):
    """On compute capability 9.0 they are formed for eight heads at a time."""
    emulated(**HOPPER)
    args = inputs("sigmoid", "scalar", "head", BF16, T=20, HV=10)
    plain = [both(x).astype(np.float32) for x in args[3:]]
    exact = cd.chunk_delta_rule(*args[:3], *plain, qk_l2norm=True).o
    assert deviation(cd.chunk_delta_rule(*args, qk_l2norm=True).o, exact) <= 2 * UNIT[BF16] + 1e-5


@pytest.mark.parametrize(
    ("formula", "gate", "bias", "dtype"),
    [("softplus", "channel", "channel", BF16), ("sigmoid", "scalar", "head", F64)],
)
def test_token_by_token(emulated, formula, gate, bias, dtype):
    args = inputs(formula, gate, bias, dtype, T=5, B=2)
    wide = [*(np.asarray(x, np.float64) for x in args[:3]), both(args[3]), both(args[4])]
    bound = 2 * UNIT[dtype] + (1e-14 if dtype == F64 else 1e-6)
    exact = cd.recurrent_delta_rule(*wide, qk_l2norm=True)
    found = cd.recurrent_delta_rule(*args, qk_l2norm=True)
    assert deviation(found.o, exact.o) <= bound
    pool = np.zeros((2, 2, 16, 16), found.final_state.dtype)
    assert deviation(cd.delta_rule_step(*args, state=pool, qk_l2norm=True), exact.o) <= bound
    assert deviation(pool, exact.final_state) <= bound


def test_strengths_per_value_channel(emulated):
    args = inputs("softplus", "scalar", None, BF16, T=5)
    args[3] = cd.SigmoidBeta(np.random.default_rng(1).standard_normal((1, 5, 2, 16), np.float32))
    wide = [*(np.asarray(x, np.float64) for x in args[:3]), both(args[3]), both(args[4])]
    exact = cd.recurrent_delta_rule(*wide, qk_l2norm=True).o
    assert deviation(cd.recurrent_delta_rule(*args, qk_l2norm=True).o, exact) <= 2 * UNIT[BF16]


def test_pieces(emulated):
    q, k, v, beta, g = inputs("softplus", "scalar", "head", BF16)
    results = []
    for b, gates in ((beta, g), tuple(both(x).astype(np.float32) for x in (beta, g))):
        factors = cd.wy_factors(k, v, b, gates, qk_l2norm=True)
        passed = cd.state_pass(k, factors.w, factors.u, gates, qk_l2norm=True)
        o = cd.chunk_output(q, k, passed.v_new, passed.states, gates, qk_l2norm=True)
        results.append((*factors, *passed, o, *cd.sequence_transfer(k, v, b, gates)))
    for x, y in zip(*results, strict=True):
        assert deviation(x, y) <= 4 * UNIT[BF16]


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_forms_what_it_reads_and_nothing_else():
    problem = problem_of(*inputs("sigmoid", "scalar", "head", BF16))
    for facts in (A100, H200):
        plan = made("forward", problem, facts)
        entries = [x.entry for x in plan.launches if x.file.startswith("tokens/raw")]
        # Those of compute capability 9.0 form them where they are read.
        assert entries == (["raw_gate", "raw_beta"] if facts is A100 else [])
        read = {name for name, _ in plan.read}
        assert {"a", "A_log", "dt_bias", "logits"} <= read and not read & {"g", "beta"}
        _, kept = plan_with_residuals(problem, facts)
        backward = made("backward", problem, facts)
        assert {"a", "A_log", "dt_bias", "logits"} <= {*kept}
        assert not {"dg", "dbeta"} & backward.outputs.keys()
        assert {"da", "dA_log", "ddt_bias", "dlogits"} <= backward.outputs.keys()
        assert {name for name, _ in backward.read} <= {*kept, "do", "dfinal_state"}


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_g_per_key_channel_is_not_kept(gate):
    """It would be as much as all else: the backward forms it again."""
    problem = problem_of(*inputs("sigmoid", gate, "head", BF16))
    _, kept = plan_with_residuals(problem, A100)
    backward = [x.entry for x in made("backward", problem, A100).launches]
    assert {"a", "A_log", "dt_bias", "logits", "beta"} <= {*kept}
    assert ("g" in kept) == (gate == "scalar") == ("raw_gate" not in backward)


def test_without_raw_parameters_plans_have_no_launch_more():
    q, k, v, beta, g = inputs("sigmoid", "scalar", "head", BF16)
    problem = problem_of(q, k, v, *(both(x).astype(np.float32) for x in (beta, g)))
    for operation in ("forward", "training", "backward", "recurrent"):
        plan = made(operation, problem, A100)
        assert not [x for x in plan.launches if x.file.startswith("tokens/raw")]
