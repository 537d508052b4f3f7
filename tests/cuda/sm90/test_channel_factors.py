"""The factors of a gate per key channel on compute capability 9.0, alone, against float64."""

import ml_dtypes
import numpy as np
import pytest
from channels import chunks, factors_of
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import make_inputs

from cupy_delta.cuda.portable.decays import channel_arrays
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import channel
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.sm90.training import core_arrays
from cupy_delta.cuda.spec import Plan
from cupy_delta.problem import Problem

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
VARLEN = [0, 0, 1, 64, 128, 193, 200]
LEGS = ["source", "ptx"]
# A unit in the last place of numbers below 1: rounded once, and sums of rounded operands.
BOUND = {BF16: 2.0**-8, F16: 2.0**-11}


def make_case(T, *, H=1, G=1, K=64, dtype=BF16, decay=0.05, **options):
    args, kw = make_inputs(
        T, H=H, G=G, K=K, V=8, dtype=dtype, gate="channel", decay=decay, **options
    )
    q, k, v, beta, g = args
    B, cu = len(q), kw["cu_seqlens"]
    cu = None if cu is None else np.asarray(cu, np.int64)
    p = Problem(
        kind="numpy",
        dtype=dtype,
        **dict(B=B, T=T, N=B if cu is None else len(cu) - 1, H=H, HV=H * G, K=K, V=8),
        cu_seqlens=cu,
        varlen=cu is not None,
        gate="channel",
        scale=1.0,
        chunk_size=CHUNK,
    )
    arrays = dict(q=q, k=k, v=v, beta=beta.astype(np.float32), g=g.astype(np.float32))
    return p, arrays


def computed(p, arrays, leg):
    device = EmulatorDevice(Run(), leg=leg, **HOPPER)
    outputs = core_arrays(p) | channel_arrays(p, CHUNK)
    given = arrays | {"cu_seqlens": p.cu_seqlens}
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(Plan((channel.channel_factors_hopper_launch(p),), outputs), given, device)
    return {name: np.array(results[name]) for name in outputs}


def check(p, arrays, leg):
    """With unit keys no entry is above 1, so errors are absolute; of decays relative."""
    results, exact = computed(p, arrays, leg), factors_of(p, arrays)
    for name in ("core", "p", "k_read", "q_read", "k_write"):
        x = results[name].astype(np.float64)
        bound = (1 + (name in ("core", "p"))) * BOUND[p.dtype]
        assert np.abs(x - exact[name]).max() < bound, name
    decays = exact["channel_decays"]
    for slot, _, _ in chunks(p):
        x, y = results["channel_decays"][slot].astype(np.float64), decays[slot]
        assert np.all(np.abs(x - y) <= 5e-5 * y + 1e-37)
    return results


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("T", "K", "dtype"), [(1, 128, BF16), (130, 128, F16), (65, 72, BF16), (64, 8, F16)]
)
def test_lengths_and_sizes(leg, T, K, dtype):
    check(*make_case(T, B=2, H=2, G=2, K=K, dtype=dtype, beta=(0, 2)), leg)


def bounded(g):
    """Of -5 and the most of it: at the end of the range."""
    return np.random.default_rng(1).choice([-5.0, -4.9], g.shape)


def some_channels(g):
    """Resets and long memory in channels side by side."""
    g = g.copy()
    for token, value in {0: -30, 3: -20.0, 17: -88.0, 40: -np.inf, 63: -1000.0, 64: -1e4}.items():
        g[:, token, :, token % 5 :: 5] = value
    return g


GATES = {
    "bounded": bounded,
    "beyond": lambda g: np.full_like(g, -5.4),
    "constant -20": lambda g: np.full_like(g, -20.0),
    "constant -inf": lambda g: np.full_like(g, -np.inf),
    "some channels": some_channels,
    "mean 5": lambda g: 100 * g,
    "none": lambda g: 0 * g,
}


@pytest.mark.parametrize(
    ("gates", "leg"), [*((gates, "source") for gates in GATES), ("some channels", "ptx")]
)
def test_gates(gates, leg):
    dtype = F16 if gates in ("bounded", "some channels") else BF16
    p, arrays = make_case(100, H=1, G=2, beta=(0, 2), dtype=dtype)
    check(p, arrays | dict(g=GATES[gates](arrays["g"]).astype(np.float32)), leg)


def test_resets_in_channels_of_every_warp():
    """Each of the four warps that sum gates meets the only reset of a block."""
    p, arrays = make_case(64, B=2, H=2, G=2, K=128)
    for block in range(4):
        arrays["g"][:, 16 * block + 5, :, 32 * block + 17] = -88
    check(p, arrays, "source")


@pytest.mark.parametrize("leg", LEGS)
def test_sequences_of_any_lengths(leg):
    """NaN right before and after a ragged chunk; rows of no sequence stay as they were."""
    p, arrays = make_case(200, H=2, G=2, cu_seqlens=[3, 3, 4, 40, 110, 175])
    for x in arrays.values():
        x[:, 40:110] = np.nan
        x[:, 175:] = np.nan
    results, exact = computed(p, arrays, leg), factors_of(p, arrays)
    for name in ("core", "p", "k_read", "q_read", "k_write"):
        x, y = results[name], exact[name]
        for rows in (slice(3, 40), slice(110, 175)):
            assert np.abs(x[:, rows].astype(np.float64) - y[:, rows]).max() < BOUND[p.dtype]
        for rows in (slice(3), slice(175, 200)):
            assert np.all(np.ascontiguousarray(x[:, rows]).view(np.uint8) == 255)


@pytest.mark.parametrize(("later", "first"), [(-5.0, 32), (-40.0, 57), (-np.inf, 21)])
def test_no_bit_depends_on_a_later_gate(later, first):
    p, arrays = make_case(64, K=64, decay=0.4)
    results = []
    for value in (None, later):
        g = arrays["g"].copy()
        if value is not None:
            g[:, first:] = value
        results.append(computed(p, arrays | dict(g=g), "source"))
    for name in ("core", "p", "k_read", "q_read"):
        before, after = (x[name][:, :first].view(np.uint8) for x in results)
        assert np.array_equal(before, after), name
