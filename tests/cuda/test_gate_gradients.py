"""Gradients through a scalar gate, over decays of every strength, by the whole way of a CuPy call.

Every pattern of gates has a head of its own, and is judged by itself.
"""

import numpy as np
import pytest
from helpers import make_inputs
from rounded import error
from strengths import (
    BF16,
    CHUNK,
    F16,
    F32,
    NAMES,
    TOKENS,
    T,
    check,
    exact_results,
    output_gradients,
    results,
)


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
    return args, kw, *output_gradients(args, kw)


@pytest.mark.ptx_leg(dtype=[F16, F32])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_decays_of_every_strength(emulated, on_reference, dtype):
    check(on_reference, PATTERNS, CHUNK[dtype], *inputs(dtype))


@pytest.mark.ptx_leg(dtype=[BF16])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_small_gradient_beside_large_ones(emulated, on_reference, dtype):
    """Of tokens that forget among such that remember, and of the state that they forget."""
    args, kw, do, dfinal = inputs(dtype)
    found = results(args, kw, do, dfinal)
    exact = exact_results(on_reference, args, kw, do, dfinal)
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
