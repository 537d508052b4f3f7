"""The factors of training on compute capability 9.0, alone, under the race-checking emulator."""

from dataclasses import replace
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
    q, k, _, beta, g = args
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
    if g is not None:
        p = replace(p, gate="scalar")
        g = g.astype(np.float32)
    return p, dict(q=q, k=k, beta=beta.astype(np.float32), g=g)


def computed(p, arrays, *, leg="source", run=None):
    """Return core, P and decays, if any; what the kernel does not write has all bits set."""
    device = EmulatorDevice(run or Run(), leg=leg, **HOPPER)
    outputs = training.core_arrays(p)
    given = arrays | {"cu_seqlens": p.cu_seqlens}
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(Plan((training.wy_factors_hopper_launch(p),), outputs), given, device)
    return [np.array(results[name]) for name in outputs]


def chunks(p):
    """Batch row and rows of tokens of every chunk."""
    spans = [(b, 0, p.T) for b in range(p.B)]
    if p.cu_seqlens is not None:
        spans = [(0, *map(int, ends)) for ends in pairwise(p.cu_seqlens)]
    for b, start, stop in spans:
        for first in range(start, stop, CHUNK):
            yield b, slice(first, min(first + CHUNK, stop))


def gate_sums(p, arrays, b, rows, hv):
    """Sums of a chunk's gates; what is below -1000 decays all the same, and has differences."""
    if arrays["g"] is None:
        return np.zeros(rows.stop - rows.start)
    return np.cumsum(np.maximum(arrays["g"][b, rows, hv].astype(np.float64), -1000))


def definition(p, arrays):
    """Return core and P, without a gate of the key heads, in float64."""
    q, k, beta = (np.asarray(arrays[name], np.float64) for name in ("q", "k", "beta"))
    gated = arrays["g"] is not None
    core, pairs = (np.zeros((p.B, p.T, n, CHUNK)) for n in (p.HV, p.HV if gated else p.H))
    for b, rows in chunks(p):
        n = rows.stop - rows.start
        for hv in range(p.HV):
            h = hv // p.groups
            Q, X = q[b, rows, h], k[b, rows, h]
            G = gate_sums(p, arrays, b, rows, hv)
            D = np.exp(np.minimum(G[:, None] - G, 0))
            M = np.tril(X @ X.T * D, -1)
            core[b, rows, hv, :n] = -M @ np.linalg.inv(np.eye(n) + beta[b, rows, hv, None] * M)
            pairs[b, rows, hv if gated else h, :n] = np.tril(Q @ X.T * D)
    return core, pairs


def check(p, arrays, **options):
    """Compare with float64: with unit keys no entry is above 1, so errors are absolute."""
    core, pairs, *_ = results = computed(p, arrays, **options)
    for x, y in zip((core, pairs), definition(p, arrays), strict=True):
        assert np.abs(x.astype(np.float64) - y).max() < BOUND[p.dtype]
    return results


def check_decays(p, arrays, decays):
    """e^G and e^(G_C - G) within some float32 roundings, relative to themselves, and 2^(sums) too.

    Past the end of a sequence gates count as zero.
    """
    for n, (b, rows) in enumerate(chunks(p)):
        slot = n if p.cu_seqlens is None else slot_of(p, rows.start)
        for hv in range(p.HV):
            G = gate_sums(p, arrays, b, rows, hv)
            G = np.pad(G, (0, CHUNK - len(G)), mode="edge")
            reads, writes, high, low = decays[slot, hv].astype(np.float64)
            for x, y in ((reads, np.exp(G)), (writes, np.exp(G[-1] - G))):
                assert np.all(np.abs(x - y) <= 2e-5 * y + 1e-37)
            assert np.all(np.abs((high + low) * np.log(2) - G) <= 1e-12 * np.abs(G))


def slot_of(p, start):
    """Slot of the chunk that begins at a token."""
    n = int(np.searchsorted(p.cu_seqlens, start, side="right")) - 1
    return int(p.cu_seqlens[n]) // CHUNK + n + (start - int(p.cu_seqlens[n])) // CHUNK


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("T", "G"), [(1, 3), (64, 2), (130, 1)])
def test_lengths_and_heads(leg, T, G):
    check(*make_case(T, B=2, H=2, G=G, K=128, beta=(0, 2)), leg=leg)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("K", "dtype"), [(8, BF16), (64, F16), (72, F16)])
def test_head_sizes(leg, K, dtype):
    check(*make_case(65, G=2, K=K, dtype=dtype), leg=leg)


RESETS = {0: -30, 3: -20.0, 17: -88.0, 40: -np.inf, 63: -1000.0, 64: -np.inf, 127: -np.inf}


def with_gates(case, pattern):
    p, arrays = case
    g = arrays["g"]
    if pattern == "resets":
        for token, value in RESETS.items():
            g[:, token] = value
    elif pattern is not None:
        g[...] = pattern
    return p, arrays


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("pattern", "decay"), [("resets", 0.01), (-20, 1), (-np.inf, 1), (None, 2)]
)
def test_gates(leg, pattern, decay):
    """Products of tokens carry the gates between them, however strong these are."""
    case = make_case(130, H=2, G=3, K=64, gate="scalar", decay=decay, beta=(0, 2))
    p, arrays = with_gates(case, pattern)
    *_, decays = check(p, arrays, leg=leg)
    check_decays(p, arrays, decays)


@pytest.mark.parametrize("leg", LEGS)
def test_weak_gates_after_strong_ones(leg):
    """Differences of sums that are large keep their digits."""
    p, arrays = make_case(64, K=64, dtype=F16, gate="scalar", decay=1e-3)
    arrays["g"][:, :20] = -1000
    core, pairs, decays = check(p, arrays, leg=leg)
    check_decays(p, arrays, decays)
    later = np.s_[:, 20:, :, 20:]
    for x, y in zip((core, pairs), definition(p, arrays), strict=True):
        assert error(x[later], y[later]) < 1.1 * error(y[later].astype(F16), y[later])


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("gate", [None, "scalar"])
def test_sequences_of_any_lengths(leg, gate):
    """NaN right before and after a ragged chunk; rows of no sequence stay as they were."""
    p, arrays = make_case(200, H=2, G=2, cu_seqlens=[3, 3, 4, 40, 110, 175], gate=gate)
    if gate:
        *_, decays = computed(p, arrays, leg=leg)
        check_decays(p, arrays, decays)
    for x in arrays.values():
        if x is not None:
            x[:, 40:110] = np.nan
            x[:, 175:] = np.nan
    core, pairs, *_ = computed(p, arrays, leg=leg)
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
    core, *_ = check(*make_case(64, beta=(0, 0)), leg=leg)
    assert np.any(core)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("gate", [None, "scalar"])
def test_any_order_of_events_gives_the_same_bits(leg, gate):
    p, arrays = make_case(200, H=2, G=3, cu_seqlens=VARLEN, gate=gate)
    runs = [Run(), Run("descending", "early"), Run("random", "either", preempt=30, seed=1)]
    first, *others = (computed(p, arrays, leg=leg, run=run) for run in runs)
    for other in others:
        assert all(x.tobytes() == y.tobytes() for x, y in zip(first, other, strict=True))
