"""The chunk-parallel gradients with a gate per key channel on compute capability 9.0, alone."""

import ml_dtypes
import numpy as np
import pytest
from channels import patterns
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from portable.test_backward_channel import BOUND, case, definition
from rounded import error

from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90.channel import backward_channel_hopper_launch
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import Plan, gradient_arrays

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LEGS = ["source", "ptx"]


def computed(p, arrays, leg="source"):
    device = EmulatorDevice(Run(), leg=leg, **HOPPER)
    launch = backward_channel_hopper_launch(p)
    outputs = {name: gradient_arrays(p, CHUNK)[0][name] for name in ("dq", "dk", "dv", "dbeta")}
    outputs["dg"] = ((*p.token_shape, p.K), np.dtype(np.float32))
    given = arrays | {"cu_seqlens": p.cu_seqlens}
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(Plan((launch,), outputs), given, device)
    return {name: np.array(results[name], np.float64) for name in outputs}


def check(p, arrays, leg="source"):
    results, exact = computed(p, arrays, leg), definition(p, arrays)
    for name, x in results.items():
        assert error(x, exact[name]) < BOUND[p.dtype], name
    return results, exact


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("T", "K", "V", "dtype", "options"),
    [
        (70, 128, 72, BF16, dict(B=2)),
        (150, 40, 128, F16, dict(H=2)),
        (101, 8, 40, BF16, dict(cu_seqlens=[0, 0, 1, 64, 65, 101])),
        (64, 72, 16, F16, dict()),
    ],
)
def test_shapes(T, K, V, dtype, options, leg):
    check(*case(T, CHUNK, K=K, V=V, dtype=dtype, beta=(0, 2), **options), leg)


def resets_everywhere(T, K):
    """Return gates by name: of every place in a block, beside weak ones and such as add up."""
    rng = np.random.default_rng(4)
    found, channels = {}, np.arange(K)
    for reset in (-20, -88, -np.inf):
        for others in (0.01, 8):
            g = -others * rng.random((T, K))
            for first in (0, 16, 35):
                g[first + channels % 16, channels] = reset
            found[f"{reset} among {others}"] = g
    return found


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_gate_by_itself(dtype):
    """Of every token and channel, however small its gradient is; that of -inf is zero."""
    T, K = 70, 24
    found = patterns(T, K) | resets_everywhere(T, K)
    gates = np.stack([*found.values()], axis=1)[None].astype(np.float32)
    p, arrays = case(T, CHUNK, H=gates.shape[2], K=K, V=16, dtype=dtype)
    arrays["g"] = gates
    results, exact = check(p, arrays)
    for h, pattern in enumerate(found):
        for name in ("dq", "dk", "dg"):
            off = error(results[name][:, :, h], exact[name][:, :, h])
            assert off < BOUND[dtype], (name, pattern)
    dg, right = results["dg"], exact["dg"]
    assert not dg[gates <= -1000].any()
    small = (gates <= -5) & (gates > -80)
    # Sums of terms of both signs, each rounded: judged against what a term can be.
    off = np.abs(dg - right)[small] / np.exp(gates[small].astype(np.float64))
    assert np.max(off) < 100 * BOUND[dtype]


def test_nan_stays_in_its_chunk_and_channel():
    p, arrays = case(133, CHUNK, K=72, V=16, dtype=BF16)
    before = computed(p, arrays)
    arrays["g"][0, 70, 0, [3, 66]] = np.nan
    after = computed(p, arrays)
    others = np.delete(np.arange(72), [3, 66])
    for name in ("dq", "dk", "dg"):
        was, x = before[name][0, :, 0], after[name][0, :, 0]
        np.testing.assert_array_equal(x[:, others], was[:, others])
        np.testing.assert_array_equal(x[:64], was[:64])
        np.testing.assert_array_equal(x[128:], was[128:])
        assert np.isnan(x[70, [3, 66]]).all(), name
