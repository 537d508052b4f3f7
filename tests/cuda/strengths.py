"""Calls in which every head has gates of a pattern of its own, and is judged by itself."""

import ml_dtypes
import numpy as np
from rounded import error, rounded_gradients, rounded_products, wide

import cupy_delta as cd

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
CHUNK = {BF16: 32, F16: 32, F32: 16}
T = 70
# First and last tokens, and those at the borders of blocks and chunks of 16, 32 and 64.
TOKENS = (0, 15, 16, 31, 32, 40, 63, 64, T - 1)
NAMES = ("o", "final_state", *cd.DeltaRuleGradients._fields)


def output_gradients(args, kw):
    """Return gradients of o, and small ones of the final state."""
    rng = np.random.default_rng(2)
    do = rng.standard_normal(args[2].shape).astype(args[2].dtype)
    dfinal = 0.2 * rng.standard_normal(kw["initial_state"].shape)
    return do, dfinal.astype(np.float32)


def results(args, kw, do, dfinal):
    """Return outputs and gradients by their names."""
    forward = cd.chunk_delta_rule_fwd(*args, **kw)
    gradients = cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)
    return dict(zip(NAMES, (forward.o, forward.final_state, *gradients), strict=True))


def exact_results(on_reference, args, kw, do, dfinal):
    """The same in float64."""
    return on_reference(results, *wide(args, kw), do.astype(float), dfinal.astype(float))


def of_head(name, x, h):
    return x[:, h] if name in ("final_state", "initial_state") else x[:, :, h]


def check(on_reference, patterns, chunk, args, kw, do, dfinal):
    """Outputs within 2x and gradients within 3x of plain rounded products; float of NumPy's 4x."""
    dtype = args[0].dtype
    found = results(args, kw, do, dfinal)
    exact = exact_results(on_reference, args, kw, do, dfinal)
    if dtype == F32:
        other = on_reference(results, args, kw, do, dfinal)
    else:
        plain = rounded_products(args, kw, chunk)
        plain += rounded_gradients(args, kw, do, dfinal, chunk)
        other = dict(zip(NAMES, plain, strict=True))
    assert found["g"].dtype == np.float32 and found["g"].shape == args[4].shape
    for name, x in found.items():
        times = 4 if dtype == F32 else 2 if name in NAMES[:2] else 3
        for h, pattern in enumerate(patterns):
            head, right, beside = (of_head(name, y, h) for y in (x, exact[name], other[name]))
            assert np.isfinite(head.astype(float)).all(), (name, pattern)
            bound = times * max(error(beside, right), 1e-7)
            assert error(head, right) <= bound, (name, pattern)
    assert not found["g"][args[4] <= -1000].any()
