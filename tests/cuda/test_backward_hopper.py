"""The walks of training on compute capability 9.0 under the race-checking emulator."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, Run
from helpers import definition, make_inputs
from rounded import error, rounded_products, twice, wide

import cupy_delta as cd
from cupy_delta.cuda import hopper_walks, plan
from cupy_delta.cuda.hopper import Division
from cupy_delta.cuda.kernels import DeviceFacts
from cupy_delta.cuda.variants import launches_of

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Empty and one-token sequences, ends within, at and right after a chunk.
VARLEN = [0, 0, 1, 64, 128, 193, 200]
H200 = DeviceFacts(132, 227 * 1024, (9, 0))


@pytest.fixture
def divided(monkeypatch, emulated):
    """Return a function that fixes the slices per block and the segments, on a Hopper device."""

    def use(math, segments=1, run=None):
        fixed = Division(math, segments, math)
        for name in ("forward_division", "backward_division"):
            monkeypatch.setattr(hopper_walks, name, lambda *args: fixed)
        for name in ("plan_forward", "plan_backward"):
            monkeypatch.setattr(plan, name, plan.planned(getattr(plan, name).__wrapped__))
        emulated(run, **HOPPER)

    use.emulated = emulated
    return use


def gradients_of(args, kw, do, dfinal, **options):
    """Return o, final_state and the gradients that there are."""
    forward = cd.chunk_delta_rule_fwd(*args, **kw, **options)
    gradients = cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)
    return forward.o, forward.final_state, [x for x in gradients if x is not None]


def upstream(args, kw, seed=1):
    rng = np.random.default_rng(seed)
    do = rng.standard_normal(args[2].shape).astype(args[2].dtype)
    N = len(args[2]) if kw["cu_seqlens"] is None else len(kw["cu_seqlens"]) - 1
    K, V = args[0].shape[3], args[2].shape[3]
    shape = (K, V) if kw["state_layout"] == "kv" else (V, K)
    return do, rng.standard_normal((N, args[2].shape[2], *shape)).astype(np.float32)


def check(divided, on_reference, args, kw, final=True):
    """Outputs within 2x of plain rounded products; gradients within the bounds of other kernels."""
    do, dfinal = upstream(args, kw)
    dfinal = dfinal if final else None
    o, final_state, gradients = gradients_of(args, kw, do, dfinal)
    if divided.emulated.devices is not None:
        entries = [x.entry for device in divided.emulated.devices[-2:] for x in device.launches]
        assert "forward_residuals_hopper" in entries
        assert "backward_state_hopper" in entries
    wide_args, wide_kw = wide(args, kw)
    exact = definition(*wide_args, **wide_kw)
    plain = rounded_products(args, kw, 64)
    for x, y, other in zip((o, final_state), exact, plain, strict=True):
        assert error(x, y) < twice(other, y)
    wide_dfinal = None if dfinal is None else dfinal.astype(np.float64)
    expected = on_reference(gradients_of, wide_args, wide_kw, do.astype(np.float64), wide_dfinal)[2]
    bound = {BF16: 1.5e-2, F16: 2e-3}[args[0].dtype]
    for x, y in zip(gradients, expected, strict=True):
        assert error(x, y) < bound


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("math", [1, 2])
def test_lengths(divided, on_reference, math, T):
    divided(math)
    args, kw = make_inputs(T, B=2, G=2, K=128, V=128, dtype=BF16, initial=True, beta=(0, 2))
    check(divided, on_reference, args, kw)
