"""q and k normalised by one launch: rows of any width, of all sizes side by side in a warp."""

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorDevice, copy_in
from helpers import normalised, normalised_gradient

from cupy_delta.call import Call
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import Plan
from cupy_delta.cuda.tokens import l2norm

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
BOUND = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}
# Whose squares overflow in float, which float16 has none of, whose squares vanish, and ordinary.
SIZES = {F32: (3e38, 1e20, 1e-30, 1), F16: (6e4, 300, 6e-8, 1), BF16: (3e38, 1e20, 1e-30, 1)}
# Of one element up to more than a lane has at once; also beginning at no multiple of 16 bytes.
WIDTHS = [(1, BF16), (3, F32), (24, F16), (100, F32), (129, BF16), (255, F16), (256, F32)]
ROWS = 67  # of no whole block


def rows(K, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (1, ROWS, 1, K)) * np.resize(SIZES[dtype], ROWS)[:, None, None]
    x[0, 5] = 0
    return x.astype(dtype)


def call_of(K, dtype, T=ROWS):
    return Call(dtype=dtype, B=1, T=T, N=1, H=1, HV=1, K=K, V=8, qk_l2norm=True)


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize(("K", "dtype"), WIDTHS)
def test_rows_of_every_width(leg, K, dtype):
    arrays = {name: rows(K, dtype, seed) for seed, name in enumerate("qk")}
    for names in (("q", "k"), ("k",)):
        launches, workspace = l2norm.normalised(call_of(K, dtype), *names)
        found = execute(Plan(tuple(launches), workspace), arrays, EmulatorDevice(leg=leg))
        for name in names:
            y, expected = found[f"{name}_normal"].astype(np.float64), normalised(arrays[name])
            np.testing.assert_allclose(y, expected, rtol=BOUND[dtype], atol=1e-7)


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize(("K", "dtype"), WIDTHS)
def test_gradients_of_rows_of_every_width(leg, K, dtype):
    arrays = {name: rows(K, dtype, seed) for seed, name in enumerate("qk")}
    rng = np.random.default_rng(2)
    dy = {f"d{name}": rng.standard_normal((1, ROWS, 1, K)).astype(dtype) for name in "qk"}
    launch = l2norm.l2norm_launch(call_of(K, dtype), [("q", "dq"), ("k", "dk")], backward=True)
    ready = {name: copy_in(x, name) for name, x in dy.items()}
    found = execute(Plan((launch,), {}), arrays, EmulatorDevice(leg=leg), ready=ready)
    for name, x in arrays.items():
        expected = normalised_gradient(dy[f"d{name}"].astype(np.float64), x)
        # Against what a term of it can be, the gradient over the length; below that dtypes end.
        largest = np.abs(dy[f"d{name}"].astype(np.float64)).max(axis=-1, keepdims=True)
        length = np.sqrt((x.astype(np.float64) ** 2).sum(axis=-1, keepdims=True) + 1e-6)
        least = float(np.finfo(np.float16).smallest_subnormal) if dtype == F16 else 1e-37
        off = np.abs(found[f"d{name}"].astype(np.float64) - expected)
        assert (off <= 4 * BOUND[dtype] * largest / length + least).all()


@pytest.mark.parametrize("backward", [False, True])
def test_no_rows_are_no_blocks(backward):
    assert (
        l2norm.l2norm_launch(call_of(24, BF16, T=0), [("q", "dq"), ("k", "dk")], backward).grid == 0
    )
