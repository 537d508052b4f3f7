"""Raw gates and strengths on NumPy arrays: the formulas, every function, gradients, arguments."""

from dataclasses import FrozenInstanceError, replace

import ml_dtypes
import numpy as np
import pytest
from calls import refuse
from helpers import definition, deviation, numeric_gradient
from raw import FORMS, GATES, both, carried_back, exact_beta, exact_gate, raw_gate

import cupy_delta as cd
from cupy_delta.problem import operator_problem
from cupy_delta.reference.inputs import Raw

B, T, H, HV, K, V = 2, 75, 2, 4, 3, 5
BF16 = ml_dtypes.bfloat16


def inputs(formula, gate, bias, dtype=np.float64, seed=0, T=T, **options):
    """Return q, k, v, beta and g, the last two raw."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, H, K)).astype(dtype)
    v = rng.standard_normal((B, T, HV, V)).astype(dtype)
    beta = cd.SigmoidBeta(rng.standard_normal((B, T, HV)).astype(dtype), scale=2)
    return [q, k, v, beta, raw_gate(rng, formula, gate, bias, B, T, HV, K, dtype, **options)]


def unit(args):
    """Return the same with keys of about unit length."""
    q, k, *rest = args
    return [q / 4, k / 4, *rest]


def plain(args):
    """Return the same with beta and g as arrays in float64."""
    return [*(np.asarray(x, np.float64) for x in args[:3]), both(args[3]), both(args[4])]


# ---- formulas ------------------------------------------------------------------------------------

LOGITS = np.array([0, 1e-30, 1e-3, 0.5, 1, 2, 10, 16, 17, 30, 80, 87, 88.7, 100, 1e4, 3e38, np.inf])
LOGITS = np.concatenate([-LOGITS[::-1], LOGITS])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("formula", GATES)
def test_formulas_hold_for_logits_of_any_size(formula, dtype):
    """To some units in the last place, where the result is a normal number."""
    a = LOGITS.astype(dtype).reshape(1, -1, 1)
    cls = cd.SoftplusGate if formula == "softplus" else cd.SigmoidGate
    gate = cls(a, np.zeros(1, dtype))
    described = operator_problem(
        *(np.ones((1, a.size, 1, 1), dtype),) * 3,
        np.ones((1, a.size, 1), dtype),
        gate,
        **dict.fromkeys(("scale", "initial_state", "cu_seqlens", "out")),
        qk_l2norm=False,
        state_layout="kv",
    ).raw_gate
    raw = Raw(described, a, gate.A_log, None)
    with np.errstate(all="ignore"):
        found = raw.gate(), *raw.gradients(np.ones_like(a))
        g, by_x, by_A_log = exact_gate(gate)
    for x, exact in zip(found, (g, by_x, by_A_log), strict=True):
        assert x.dtype == dtype
        same = (x == exact) | (np.abs(exact) < np.finfo(dtype).tiny)
        with np.errstate(invalid="ignore"):
            assert np.all(same | (np.abs(x - exact) <= 8 * np.finfo(dtype).eps * np.abs(exact)))


# ---- every function ------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "bias"), FORMS)
@pytest.mark.parametrize("formula", GATES)
def test_operators_do_as_with_the_arrays(formula, gate, bias):
    args = unit(inputs(formula, gate, bias))
    exact = definition(*plain(args), initial_state=None, cu_seqlens=None, state_layout="kv")
    for rule in (cd.chunk_delta_rule, cd.recurrent_delta_rule, cd.chunk_delta_rule_fwd):
        for x, y in zip(rule(*args)[:2], exact, strict=True):
            assert deviation(x, y) < 1e-12, rule


@pytest.mark.parametrize(("gate", "bias"), [("scalar", "head"), ("channel", "channel")])
@pytest.mark.parametrize("formula", GATES)
def test_steps_do_as_with_the_arrays(formula, gate, bias):
    args = unit(inputs(formula, gate, bias, T=3))
    pools = [np.zeros((B, HV, K, V)) for _ in range(2)]
    o, expected = (
        cd.delta_rule_step(*some, state=pool)
        for some, pool in zip((args, plain(args)), pools, strict=True)
    )
    assert deviation(o, expected) < 1e-13 and deviation(*pools) < 1e-13


@pytest.mark.parametrize(("gate", "bias"), [("scalar", None), ("channel", "head")])
@pytest.mark.parametrize("formula", GATES)
def test_pieces_do_as_with_the_arrays(formula, gate, bias):
    q, k, v, beta, g = unit(inputs(formula, gate, bias))
    results = []
    for b, gates in ((beta, g), (both(beta), both(g))):
        factors = cd.wy_factors(k, v, b, gates)
        passed = cd.state_pass(k, factors.w, factors.u, gates)
        o = cd.chunk_output(q, k, passed.v_new, passed.states, gates)
        transfer = cd.sequence_transfer(k, v, b, gates)
        results.append((*factors, *passed, o, *transfer))
    for x, y in zip(*results, strict=True):
        assert deviation(x, y) < 1e-12


def test_strengths_per_value_channel():
    args = unit(inputs("softplus", "channel", "channel"))
    args[3] = cd.SigmoidBeta(np.random.default_rng(1).standard_normal((B, T, HV, V)))
    found = cd.recurrent_delta_rule(*args).o
    assert deviation(found, cd.recurrent_delta_rule(*plain(args)).o) < 1e-12


@pytest.mark.parametrize("parameters", [np.float32, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_narrow_logits_are_formed_in_float32(dtype, parameters):
    args = inputs("softplus", "channel", "channel", dtype, parameters=parameters or dtype)
    wide = [*args[:3], *(both(x).astype(np.float32) for x in args[3:])]
    for x, y in zip(
        cd.chunk_delta_rule(*args, qk_l2norm=True),
        cd.chunk_delta_rule(*wide, qk_l2norm=True),
        strict=True,
    ):
        assert x.dtype == y.dtype
        assert deviation(x, y) < (1e-6 if x.dtype == np.float32 else 8e-3)


def test_a_logit_of_infinity_forgets_all():
    args = unit(inputs("softplus", "scalar", None))
    args[4].a[:, 40] = np.inf
    initial = np.random.default_rng(3).standard_normal((B, HV, K, V))
    o, state, residuals = cd.chunk_delta_rule_fwd(*args, initial_state=initial)
    alone = [x[:, 40:] for x in args[:3]]
    alone += [replace(args[3], logits=args[3].logits[:, 40:])]
    alone += [replace(args[4], a=args[4].a[:, 40:])]
    assert deviation(o[:, 40:], cd.chunk_delta_rule(*alone).o) < 1e-13
    gradients = cd.chunk_delta_rule_bwd(residuals, o, state)
    assert not gradients.g.a[:, 40].any()
    assert np.isfinite(gradients.g.A_log).all()


# ---- gradients -----------------------------------------------------------------------------------


def gradients_of(args, **options):
    o, final, residuals = cd.chunk_delta_rule_fwd(*args, **options)
    rng = np.random.default_rng(5)
    do, dfinal = (rng.standard_normal(x.shape).astype(x.dtype) for x in (o, final))
    return cd.chunk_delta_rule_bwd(residuals, do, dfinal), do, dfinal


@pytest.mark.parametrize(("gate", "bias"), FORMS)
@pytest.mark.parametrize("formula", GATES)
def test_gradients_against_central_differences(formula, gate, bias):
    args = unit(inputs(formula, gate, bias, T=5, size=1.0))
    found, do, dfinal = gradients_of(args)
    beta, g = args[3:]
    pairs = [(beta.logits, found.beta.logits), (g.a, found.g.a), (g.A_log, found.g.A_log)]
    assert (found.g.dt_bias is None) == (bias is None)
    if bias is not None:
        pairs.append((g.dt_bias, found.g.dt_bias))

    def loss():
        o, final = cd.recurrent_delta_rule(*args)
        return np.sum(o * do) + np.sum(final * dfinal)

    for x, gradient in pairs:
        assert gradient.shape == x.shape
        assert deviation(gradient, numeric_gradient(loss, x)) < 1e-8


@pytest.mark.parametrize(("gate", "bias"), FORMS)
@pytest.mark.parametrize("formula", GATES)
def test_gradients_are_those_of_the_arrays_carried_back(formula, gate, bias):
    """Over several blocks and batch rows, ragged ones too, whatever the number of threads."""
    q, k, v, beta, g = unit(inputs(formula, gate, bias, T=300))
    packed = [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
    packed.append(replace(beta, logits=beta.logits.reshape(1, -1, HV)))
    packed.append(replace(g, a=g.a.reshape(1, -1, *g.a.shape[2:])))
    for args, ends in (((q, k, v, beta, g), None), (packed, np.array([0, 0, 299, 300, 600]))):
        found, *_ = gradients_of(args, cu_seqlens=ends)
        arrays, *_ = gradients_of(plain(args), cu_seqlens=ends)
        da, dA_log, ddt_bias = carried_back(args[4], arrays.g)
        assert deviation(found.g.a, da) < 1e-12
        assert deviation(found.g.A_log, dA_log) < 1e-12
        if bias is not None:
            assert deviation(found.g.dt_bias, ddt_bias) < 1e-12
        assert deviation(found.beta.logits, arrays.beta * exact_beta(args[3])[1]) < 1e-12
        for name in ("q", "k", "v"):
            assert deviation(getattr(found, name), getattr(arrays, name)) < 1e-12


@pytest.mark.parametrize("parameters", [np.float32, None])
def test_gradients_have_the_dtypes_of_what_they_are_of(parameters):
    args = inputs("sigmoid", "channel", "channel", BF16, parameters=parameters or BF16)
    args[3] = cd.SigmoidBeta(args[3].logits.astype(np.float32))
    found, *_ = gradients_of(args, qk_l2norm=True)
    assert isinstance(found.g, cd.GateGradients) and isinstance(found.beta, cd.BetaGradients)
    assert found.beta.logits.dtype == np.float32
    for name in ("a", "A_log", "dt_bias"):
        assert getattr(found.g, name).dtype == getattr(args[4], name).dtype


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    args = inputs("softplus", "channel", "head", np.float32, T=600)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", threads)
        found, *_ = gradients_of(args, qk_l2norm=True)
        results.append([x.tobytes() for x in (*found.g, found.beta.logits)])
    assert results[0] == results[1]


# ---- what is wrong -------------------------------------------------------------------------------


def good():
    q, k, v, beta, g = inputs("softplus", "channel", "channel", np.float32, T=6)
    return dict(q=q, k=k, v=v, beta=beta, g=g)


WRONG = {
    "a in another dtype": (
        dict(a=np.zeros((2, 6, 4, 3))),
        TypeError,
        "g.a: expected dtype float32, got float64",
    ),
    "a with fewer heads": (
        dict(a=np.zeros((2, 6, 2, 3), np.float32)),
        ValueError,
        "g.a: expected (B, T, HV, K) = (2, 6, 4, 3) like v, got (2, 6, 2, 3)",
    ),
    "a per head and a bias per channel": (
        dict(a=np.zeros((2, 6, 4), np.float32)),
        ValueError,
        "g.dt_bias: expected (HV,), 1 dimension, got shape (4, 3)",
    ),
    "A_log per channel": (
        dict(A_log=np.zeros((4, 3), np.float32)),
        ValueError,
        "g.A_log: expected (HV,), 1 dimension, got shape (4, 3)",
    ),
    "A_log of the key heads": (
        dict(A_log=np.zeros(2, np.float32)),
        ValueError,
        "g.A_log: expected (HV,) = (4,) like v, got (2,)",
    ),
    "A_log as a list": (
        dict(A_log=[0.0] * 4),
        TypeError,
        "g.A_log: expected a NumPy or CuPy array, got list",
    ),
    "no A_log": (
        dict(A_log=None),
        TypeError,
        "g.A_log: expected a NumPy or CuPy array, got NoneType",
    ),
    "dt_bias laid flat": (
        dict(dt_bias=np.zeros(12, np.float32)),
        ValueError,
        "g.dt_bias: expected (HV,) = (4,) like v, got (12,)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", ["chunk_delta_rule", "recurrent_delta_rule"])
def test_wrong_parameters(function, name):
    changes, error, message = WRONG[name]
    arguments = good()
    refuse(function, arguments | {"g": replace(arguments["g"], **changes)}, error, message)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "g",
            lambda x: cd.SigmoidBeta(x["beta"].logits),
            "g: expected a NumPy or CuPy array, got cupy_delta.raw.SigmoidBeta",
        ),
        (
            "beta",
            lambda x: x["g"],
            "beta: expected a NumPy or CuPy array, got cupy_delta.raw.SoftplusGate",
        ),
        (
            "v",
            lambda x: x["beta"],
            "v: expected a NumPy or CuPy array, got cupy_delta.raw.SigmoidBeta",
        ),
        (
            "beta",
            lambda x: cd.SigmoidBeta(x["beta"]),
            "beta.logits: expected a NumPy or CuPy array, got cupy_delta.raw.SigmoidBeta",
        ),
    ],
)
def test_raw_where_it_does_not_belong(name, make, message):
    arguments = good()
    arguments[name] = make(arguments)
    refuse("chunk_delta_rule", arguments, TypeError, message)


@pytest.mark.parametrize("bound", [0, 5.0, np.nan, -np.inf, True, "-5", None, -5j])
def test_a_bound_is_a_number_below_zero(bound):
    error = ValueError if isinstance(bound, int | float) and bound is not True else TypeError
    with pytest.raises(error, match=r"^bound: expected a (finite )?number"):
        cd.SigmoidGate(np.zeros((1, 1, 1)), np.zeros(1), bound=bound)


@pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, True, "2", None])
def test_the_scale_of_a_strength_is_a_number_above_zero(scale):
    error = ValueError if isinstance(scale, int | float) and scale is not True else TypeError
    with pytest.raises(error, match=r"^scale: expected a (finite )?number"):
        cd.SigmoidBeta(np.zeros((1, 1, 1)), scale)


def test_they_cannot_be_changed():
    arguments = good()
    with pytest.raises(FrozenInstanceError):
        arguments["g"].a = None
    with pytest.raises(FrozenInstanceError):
        arguments["beta"].scale = 2


@pytest.mark.parametrize(
    ("name", "of"),
    [("beta.logits", "logits"), ("g.a", "a"), ("g.A_log", "A_log"), ("g.dt_bias", "dt_bias")],
)
def test_written_memory_overlaps_a_parameter(name, of):
    arguments = good()
    out = np.zeros((2, 6, 4, 5), np.float32)
    key = name.split(".")[0]
    x = getattr(arguments[key], of)
    arguments[key] = replace(arguments[key], **{of: out.reshape(-1)[: x.size].reshape(x.shape)})
    message = f"out: expected no memory in common with {name}"
    refuse("chunk_delta_rule", arguments | {"out": out}, ValueError, message)


# ---- what is remembered --------------------------------------------------------------------------


def test_calls_that_differ_in_a_number_alone_are_different():
    """What is checked once is remembered by all that a call depends on."""
    args = unit(inputs("sigmoid", "scalar", "head"))
    found = []
    for bound, scale in ((-5, 2), (-4, 2), (-5, 1), (-5.0, 2.0)):
        some = [*args[:3], replace(args[3], scale=scale), replace(args[4], bound=bound)]
        found.append(cd.chunk_delta_rule(*some).o)
        assert deviation(found[-1], cd.chunk_delta_rule(*plain(some)).o) < 1e-12
    assert found[0].tobytes() == found[3].tobytes()
    softplus = cd.SoftplusGate(args[4].a, args[4].A_log, args[4].dt_bias)
    some = [*args[:4], softplus]
    assert deviation(cd.chunk_delta_rule(*some).o, cd.chunk_delta_rule(*plain(some)).o) < 1e-12


def test_a_call_describes_its_gate_and_can_be_looked_up():
    """Plans depend on a call alone, so it says how its gate is formed, without an array."""
    from cupy_delta.arrays import looks
    from cupy_delta.call import Call
    from cupy_delta.problem import operator_call

    def described(args):
        found = looks(*args, None, None, None)
        return operator_call(found, ("B T HV",), None, False, "kv", None)

    args = inputs("sigmoid", "channel", "head", np.float32)
    one, same = described(args), described(inputs("sigmoid", "channel", "head", np.float32, seed=7))
    other = described([*args[:4], replace(args[4], bound=-2.0)])
    calls = [
        Call(**{n: getattr(x, n) for n in Call.__dataclass_fields__ if n != "kept"})
        for x in (one, same, other)
    ]
    assert calls[0] == calls[1] and hash(calls[0]) == hash(calls[1])
    assert calls[0] != calls[2]
    assert one.kept is same.kept and one.kept is not other.kept
    assert calls[0].raw_gate == ("sigmoid", np.dtype(np.float32), "head", -5.0)
    assert calls[0].raw_beta == (np.dtype(np.float32), 2.0) and calls[0].gate == "channel"
