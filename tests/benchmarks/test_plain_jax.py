"""The plain forms that `cupy_delta.jax` is timed beside are the delta rule."""

import jax
import numpy as np
import pytest
from comparison import plain_jax
from helpers import deviation, make_inputs

import cupy_delta as cd


@pytest.mark.slow
@pytest.mark.parametrize("form", [plain_jax.token_scan, plain_jax.chunked])
def test_plain_forms_are_the_definition(form):
    args, _ = make_inputs(150, B=2, H=2, G=2, K=8, V=6, beta=(0, 2))
    args = args[:4]
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(args[2].shape)
    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        o, state = jax.jit(form)(*args)
        loss = lambda *x: (form(*x)[0] * weights).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)
    forward = cd.chunk_delta_rule_fwd(*args, qk_l2norm=True)
    assert deviation(np.asarray(o), forward.o) < 1e-12
    assert deviation(np.asarray(state), forward.final_state) < 1e-12
    exact = cd.chunk_delta_rule_bwd(forward.residuals, weights)
    for found, wanted in zip(gradients, exact, strict=False):
        assert deviation(np.asarray(found), wanted) < 1e-11
