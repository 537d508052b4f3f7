"""A gate per key channel, forward and backward, by the whole way of a CuPy call.

Every pattern of gates has a head of its own, and is judged by itself.
"""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER
from helpers import make_inputs
from rounded import error, rounded_gradients, rounded_products, wide

import cupy_delta as cd

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
CHUNK = {BF16: 32, F16: 32, F32: 16}
T, K = 70, 16
NAMES = ("o", "final_state", *cd.DeltaRuleGradients._fields)
# First and last tokens, and those at the borders of blocks and chunks.
TOKENS = (0, 15, 16, 31, 32, 40, 63, 64, T - 1)


def patterns():
    """Return gates by name, of T tokens and K channels each."""
    rng = np.random.default_rng(3)
    long = -0.02 * rng.exponential(size=(T, K))
    found = {f"mean {mean}": -mean * rng.exponential(size=(T, K)) for mean in (0.01, 0.1, 1, 5)}
    found["bound -5"] = -5 / (1 + np.exp(-4 * rng.standard_normal((T, K))))
    found["constant 0"] = np.zeros((T, K))
    found["some channels forget"] = g = long.copy()
    g[:, ::3] = -20
    for reset in (-20, -88, -1000, -np.inf):
        found[f"single channels of {reset}"] = g = long.copy()
        for token in TOKENS:
            g[token, token % 5 :: token % 3 + 2] = reset
    found["all channels of one token"] = g = long.copy()
    g[36] = -np.inf
    found["a run of resets"] = g = long.copy()
    g[20:36, 1::2] = -np.inf
    return found


PATTERNS = patterns()


def inputs(dtype, **more):
    options = dict(dtype=dtype, gate="channel", initial=True, beta=(0, 2), correlation=0.3) | more
    args, kw = make_inputs(T, H=len(PATTERNS), K=K, V=32, **options)
    args[3] = args[3].astype(np.float32)
    args[4] = np.stack([*PATTERNS.values()], axis=1)[None].astype(np.float32)
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


@pytest.mark.parametrize(
    ("dtype", "facts"), [(BF16, {}), (F16, {}), (F32, {}), (BF16, HOPPER), (F16, HOPPER)]
)
def test_decays_of_every_strength(emulated, on_reference, dtype, facts):
    """Outputs within 2x and gradients within 3x of plain rounded products; float of NumPy's 4x."""
    emulated(None, **facts)
    chunk = 64 if facts else CHUNK[dtype]
    args, kw, do, dfinal = inputs(dtype)
    found = results(args, kw, do, dfinal)
    wide_args, wide_kw = wide(args, kw)
    exact = on_reference(results, wide_args, wide_kw, do.astype(float), dfinal.astype(float))
    if dtype == F32:
        other = on_reference(results, args, kw, do, dfinal)
    else:
        plain = rounded_products(args, kw, chunk)
        plain += rounded_gradients(args, kw, do, dfinal, chunk)
        other = dict(zip(NAMES, plain, strict=True))
    assert found["g"].dtype == np.float32 and found["g"].shape == args[4].shape
    for name, x in found.items():
        times = 4 if dtype == F32 else 2 if name in NAMES[:2] else 3
        for h, pattern in enumerate(PATTERNS):
            head, right, beside = (of_head(name, y, h) for y in (x, exact[name], other[name]))
            assert np.isfinite(head.astype(float)).all(), (name, pattern)
            bound = times * max(error(beside, right), 1e-7)
            assert error(head, right) <= bound, (name, pattern)
    assert not found["g"][args[4] <= -1000].any()


def test_ragged_sequences_grouped_heads_and_norms(emulated, on_reference):
    options = dict(dtype=BF16, gate="channel", initial=True, layout="vk", beta=(0, 2))
    args, kw = make_inputs(T, H=2, G=2, K=24, V=40, cu_seqlens=[0, 0, 1, 40, T], **options)
    kw["qk_l2norm"] = True
    found = results(args, kw, args[2], kw["initial_state"])
    expected = on_reference(results, args, kw, args[2], kw["initial_state"])
    for name in NAMES:
        assert found[name].dtype == expected[name].dtype, name
        assert error(found[name], expected[name]) < 2e-2, name
