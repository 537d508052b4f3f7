"""Gradients through a scalar gate, over decays of every strength, by the whole way of a CuPy call.

Every pattern of gates has a head of its own, and is judged by itself.
"""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs
from rounded import error, rounded_gradients, rounded_products, wide

import cupy_delta as cd

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
CHUNK = {BF16: 32, F16: 32, F32: 16}
T = 70
NAMES = ("o", "final_state", *cd.DeltaRuleGradients._fields)
# First and last tokens, and those at the borders of chunks of 16, 32 and 64.
TOKENS = (0, 15, 16, 31, 32, 40, 63, 64, T - 1)


def patterns():
    """Return gates by name, of T tokens each."""
    rng = np.random.default_rng(3)
    long = -0.02 * rng.exponential(size=T)
    found = {f"mean {mean}": -mean * rng.exponential(size=T) for mean in (0.01, 0.1, 1, 5)}
    found |= {f"constant {g}": np.full(T, g) for g in (0, -0.5, -1.2, -2.4, -5, -20)}
    for reset in (-20, -88, -1000, -np.inf):
        found[f"tokens of {reset}"] = g = long.copy()
        g[list(TOKENS)] = reset
        found[f"one of {reset}"] = g = long.copy()
        g[36] = reset
    found["a run of resets"] = g = long.copy()
    g[20:36] = -np.inf
    return found


PATTERNS = patterns()


def inputs(dtype):
    options = dict(dtype=dtype, gate="scalar", initial=True, beta=(0, 2), correlation=0.3)
    # Three batch rows and a small gradient of the final state: few tokens must not decide alone.
    args, kw = make_inputs(T, B=3, H=len(PATTERNS), K=16, V=32, **options)
    args[3] = args[3].astype(np.float32)
    args[4] = np.stack([list(PATTERNS.values())] * 3).swapaxes(1, 2).astype(np.float32)
    rng = np.random.default_rng(2)
    do = rng.standard_normal(args[2].shape).astype(dtype)
    dfinal = 0.2 * rng.standard_normal(kw["initial_state"].shape)
    return args, kw, do, dfinal.astype(np.float32)


def results(args, kw, do, dfinal):
    forward = cd.chunk_delta_rule_fwd(*args, **kw)
    gradients = cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)
    return dict(zip(NAMES, (forward.o, forward.final_state, *gradients), strict=True))


def of_head(name, x, h):
    return x[:, h] if name in ("final_state", "initial_state") else x[:, :, h]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_decays_of_every_strength(emulated, on_reference, dtype):
    """Outputs within 2x and gradients within 3x of plain rounded products; float of NumPy's 4x."""
    args, kw, do, dfinal = inputs(dtype)
    found = results(args, kw, do, dfinal)
    wide_args, wide_kw = wide(args, kw)
    exact = on_reference(results, wide_args, wide_kw, do.astype(float), dfinal.astype(float))
    if dtype == F32:
        other = on_reference(results, args, kw, do, dfinal)
    else:
        plain = rounded_products(args, kw, CHUNK[dtype])
        plain += rounded_gradients(args, kw, do, dfinal, CHUNK[dtype])
        other = dict(zip(NAMES, plain, strict=True))
    assert found["g"].dtype == np.float32 and found["g"].shape == args[4].shape
    for name, x in found.items():
        times = 4 if dtype == F32 else 2 if name in NAMES[:2] else 3
        for h, pattern in enumerate(PATTERNS):
            head, right, beside = (of_head(name, y, h) for y in (x, exact[name], other[name]))
            assert np.isfinite(head.astype(float)).all(), (name, pattern)
            bound = times * max(error(beside, right), 1e-7)
            assert error(head, right) <= bound, (name, pattern)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_small_gradient_beside_large_ones(emulated, on_reference, dtype):
    """Of tokens that forget among such that remember, and of the state that they forget."""
    args, kw, do, dfinal = inputs(dtype)
    found = results(args, kw, do, dfinal)
    wide_args, wide_kw = wide(args, kw)
    exact = on_reference(results, wide_args, wide_kw, do.astype(float), dfinal.astype(float))
    bound = {BF16: 2e-2, F16: 3e-3, F32: 3e-6}[dtype]
    # The kernels of 9.0, which a GPU takes here, round dO with its decay: to 0 below 2^-24.
    least = 2.0**-24 if dtype == F16 and emulated.devices is None else 1e-30
    for h, pattern in enumerate(PATTERNS):
        gate, g, right = args[4][0, :, h], found["g"][:, :, h], exact["g"][:, :, h]
        assert not g[:, gate <= -1000].any(), pattern
        small = (gate <= -5) & (gate > -80)
        if small.any():
            assert error(g[:, small], right[:, small]) < bound, pattern
        state, right = (x["initial_state"][:, h].astype(float) for x in (found, exact))
        away = np.linalg.norm(state - right)
        assert away <= bound * np.linalg.norm(right) + least * right.size**0.5, pattern


@pytest.mark.parametrize("gate", [BF16, F32])
def test_the_gradient_has_the_dtype_of_the_gate(emulated, on_reference, gate):
    options = dict(dtype=BF16, gate="scalar", initial=True, cu_seqlens=[0, 0, 1, 40, T])
    args, kw = make_inputs(T, H=2, G=2, K=32, V=24, **options)
    args[4] = args[4].astype(gate)
    do = args[2]
    found = results(args, kw | dict(qk_l2norm=True), do, None)
    expected = on_reference(results, args, kw | dict(qk_l2norm=True), do, None)
    assert found["g"].dtype == gate
    for name in NAMES:
        assert error(found[name], expected[name]) < 2e-2, name
