"""The factors of training on compute capability 9.0, alone, under the race-checking emulator."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import make_inputs
from rounded import error

from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import training
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.spec import Plan
from cupy_delta.problem import Problem

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Empty and one-token sequences, ends within, at and right after a chunk.
VARLEN = [0, 0, 1, 64, 128, 193, 200]
LEGS = ["source", "ptx"]
# Half a unit in the last place of a number between 1/2 and 1, and a tenth for all other errors.
BOUND = {BF16: 1.1 * 2.0**-9, F16: 1.1 * 2.0**-12}


def make_case(T, *, H=1, G=1, K=64, dtype=BF16, **options):
    args, kw = make_inputs(T, H=H, G=G, K=K, V=8, dtype=dtype, **options)
    q, k, _, beta, _ = args
    B, cu = len(q), kw["cu_seqlens"]
    cu = None if cu is None else np.asarray(cu, np.int64)
    sizes = dict(B=B, T=T, N=B if cu is None else len(cu) - 1, H=H, HV=H * G, K=K, V=8)
    p = Problem(
        kind="numpy",
        dtype=dtype,
        **sizes,
        cu_seqlens=cu,
        varlen=cu is not None,
        scale=1.0,
        chunk_size=CHUNK,
    )
    return p, dict(q=q, k=k, beta=beta.astype(np.float32))


def computed(p, arrays, *, leg="source", run=None):
    """Return core and P; what the kernel does not write has all bits set."""
    device = EmulatorDevice(run or Run(), leg=leg, **HOPPER)
    heads = {"core": p.HV, "p": p.H}
    outputs = {name: ((p.B, p.T, n, CHUNK), p.dtype) for name, n in heads.items()}
    given = {name: copy_in(x, name) for name, x in arrays.items()}
    given["cu_seqlens"] = None if p.cu_seqlens is None else copy_in(p.cu_seqlens, "cu_seqlens")
    results = execute(Plan((training.wy_factors_hopper_launch(p),), outputs), given, device)
    return np.array(results["core"]), np.array(results["p"])


def chunks(p):
    """Batch row and rows of tokens of every chunk."""
    spans = [(b, 0, p.T) for b in range(p.B)]
    if p.cu_seqlens is not None:
        spans = [(0, *map(int, ends)) for ends in pairwise(p.cu_seqlens)]
    for b, start, stop in spans:
        for first in range(start, stop, CHUNK):
            yield b, slice(first, min(first + CHUNK, stop))


def definition(p, arrays):
    """Return core and P of the key heads in float64."""
    q, k, beta = (np.asarray(arrays[name], np.float64) for name in ("q", "k", "beta"))
    core, pairs = (np.zeros((p.B, p.T, heads, CHUNK)) for heads in (p.HV, p.H))
    for b, rows in chunks(p):
        n = rows.stop - rows.start
        for hv in range(p.HV):
            h = hv // p.groups
            Q, X = q[b, rows, h], k[b, rows, h]
            M = np.tril(X @ X.T, -1)
            core[b, rows, hv, :n] = -M @ np.linalg.inv(np.eye(n) + beta[b, rows, hv, None] * M)
            pairs[b, rows, h, :n] = np.tril(Q @ X.T)
    return core, pairs


def check(p, arrays, **options):
    """Compare with float64: with unit keys no entry is above 1, so errors are absolute."""
    core, pairs = computed(p, arrays, **options)
    for x, y in zip((core, pairs), definition(p, arrays), strict=True):
        assert np.abs(x.astype(np.float64) - y).max() < BOUND[p.dtype]
    return core, pairs


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("T", "G"), [(1, 3), (64, 2), (130, 1)])
def test_lengths_and_heads(leg, T, G):
    check(*make_case(T, B=2, H=2, G=G, K=128, beta=(0, 2)), leg=leg)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("K", "dtype"), [(8, BF16), (64, F16), (72, F16)])
def test_head_sizes(leg, K, dtype):
    check(*make_case(65, G=2, K=K, dtype=dtype), leg=leg)


@pytest.mark.parametrize("leg", LEGS)
def test_sequences_of_any_lengths(leg):
    """NaN right before and after a ragged chunk; rows of no sequence stay as they were."""
    p, arrays = make_case(200, H=2, G=2, cu_seqlens=[3, 3, 4, 40, 110, 175])
    for x in arrays.values():
        x[:, 40:110] = np.nan
        x[:, 175:] = np.nan
    core, pairs = computed(p, arrays, leg=leg)
    for x, y in zip((core, pairs), definition(p, arrays), strict=True):
        for rows in (slice(3, 40), slice(110, 175)):
            assert np.abs(x[:, rows].astype(np.float64) - y[:, rows]).max() < BOUND[p.dtype]
        assert np.isnan(x[:, 41:110].astype(np.float64)).any()
        for rows in (slice(3), slice(175, 200)):
            assert np.all(np.ascontiguousarray(x[:, rows]).view(np.uint8) == 255)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("correlation", "beta"), [(0.9, (2, 2)), (0.5, (0, 2)), (1.0, (2, 2))])
def test_hard_keys(leg, dtype, correlation, beta):
    """The error of the results is that of their rounding: the inverse adds next to nothing."""
    p, arrays = make_case(192, H=2, dtype=dtype, correlation=correlation, beta=beta)
    for x, y in zip(computed(p, arrays, leg=leg), definition(p, arrays), strict=True):
        assert error(x, y) < 1.1 * error(y.astype(dtype), y)


@pytest.mark.parametrize("leg", LEGS)
def test_beta_of_zero(leg):
    """Without division: core = -M."""
    core, _ = check(*make_case(64, beta=(0, 0)), leg=leg)
    assert np.any(core)


@pytest.mark.parametrize("leg", LEGS)
def test_any_order_of_events_gives_the_same_bits(leg):
    p, arrays = make_case(200, H=2, G=3, cu_seqlens=VARLEN)
    runs = [Run(), Run("descending", "early"), Run("random", "either", preempt=30, seed=1)]
    first, *others = (computed(p, arrays, leg=leg, run=run) for run in runs)
    for other in others:
        assert all(x.tobytes() == y.tobytes() for x, y in zip(first, other, strict=True))
