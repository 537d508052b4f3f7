"""Raw gates and strengths in programs of JAX: what NumPy arrays give, with gradients."""

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import deviation
from raw import FORMS, GATES, raw_gate

import cupy_delta as cd
from cupy_delta import jax as cdj

B, T, H, HV, K, V = 2, 40, 1, 2, 4, 4


def inputs(formula, gate, bias, dtype=np.float32):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K)).astype(dtype)
    v = rng.standard_normal((B, T, HV, V)).astype(dtype)
    beta = cd.SigmoidBeta(rng.standard_normal((B, T, HV)).astype(dtype), scale=2)
    return (q, k, v), beta, raw_gate(rng, formula, gate, bias, B, T, HV, K, dtype)


@pytest.mark.parametrize(("gate", "bias"), FORMS)
@pytest.mark.parametrize("formula", GATES)
def test_outputs_and_gradients(formula, gate, bias):
    arrays, beta, g = inputs(formula, gate, bias)
    o, final, residuals = cd.chunk_delta_rule_fwd(*arrays, beta, g, qk_l2norm=True)
    expected = cd.chunk_delta_rule_bwd(residuals, 2 * o)

    def loss(beta, g):
        found = cdj.chunk_delta_rule(*arrays, beta, g, qk_l2norm=True)
        return (found.o**2).sum(), found

    by = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, found), (dbeta, dg) = by(beta, g)
    assert deviation(found.o, o) < 1e-6 and deviation(found.final_state, final) < 1e-6
    assert isinstance(dg, type(g)) and isinstance(dbeta, cd.SigmoidBeta)
    assert deviation(dbeta.logits, expected.beta.logits) < 1e-5
    for name in cd.GateGradients._fields:
        x, y = getattr(dg, name), getattr(expected.g, name)
        assert (x is None) == (y is None)
        assert x is None or deviation(x, y) < 1e-5


@pytest.mark.parametrize(("gate", "bias"), FORMS)
@pytest.mark.parametrize("formula", GATES)
def test_infinite_logits_add_nothing_to_gradients(formula, gate, bias):
    arrays, beta, g = inputs(formula, gate, bias)
    g.a[:, 5], g.a[:, 20:22] = -np.inf, np.inf
    o, _, residuals = cd.chunk_delta_rule_fwd(*arrays, beta, g, qk_l2norm=True)
    expected = cd.chunk_delta_rule_bwd(residuals, np.ones_like(o)).g

    def loss(g):
        return cdj.chunk_delta_rule(*arrays, beta, g, qk_l2norm=True).o.sum()

    found = jax.jit(jax.grad(loss))(g)
    assert not found.a[:, 20].any()
    for x, y in zip(jax.tree.leaves(found), [y for y in expected if y is not None], strict=True):
        assert deviation(x, y) < 1e-5


def test_steps_and_narrow_logits():
    (q, k, v), beta, g = inputs("softplus", "channel", "channel", ml_dtypes.bfloat16)
    some = q[:, :3], k[:, :3], v[:, :3]
    beta, g = cd.SigmoidBeta(beta.logits[:, :3]), cd.SoftplusGate(g.a[:, :3], g.A_log, g.dt_bias)
    pool = np.zeros((B, HV, K, V), np.float32)
    o, state = jax.jit(cdj.delta_rule_step)(*some, beta, g, state=pool)
    expected = cd.delta_rule_step(*some, beta, g, state=pool)
    assert deviation(o, expected) < 8e-3 and deviation(state, pool) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: cd.SoftplusGate(g.a, g.A_log[:1]), ValueError, r"g\.A_log: expected \(HV,\)"),
        (lambda g: cd.SoftplusGate(g.a, [0.0, 0.0]), TypeError, "g: expected a JAX array, got"),
        (lambda g: cd.SigmoidBeta(g.a), TypeError, "g: expected .* array, got cupy_delta.raw.Sig"),
    ],
)
def test_wrong_parameters_are_errors_while_tracing(change, error, message):
    arrays, beta, g = inputs("softplus", "scalar", "head")
    with pytest.raises(error, match=message):
        cdj.chunk_delta_rule(*arrays, beta, change(g))
