"""The factors of a gate per key channel, alone, under the race-checking emulator."""

import ml_dtypes
import numpy as np
import pytest
from channels import ROWS, factors_of, make_case, patterns
from emulator import EmulatorDevice, Run, copy_in

from cupy_delta.cuda.portable.channel_factors import channel_factors_launch
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import Plan

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
# Empty and one-token sequences, ends within, at and right after a chunk and a block.
VARLEN = [0, 0, 1, 16, 33, 65, 97, 101]
# Half a unit in the last place of numbers up to 1, and as much for products of rounded factors.
BOUND = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2e-6}


def computed(p, arrays, made, beside=(*ROWS, "channel_decays"), run=None, leg="source"):
    """Return arrays by name; what the kernel does not write has all bits set."""
    device, chunk = EmulatorDevice(run or Run(), leg=leg), p.chunk_size
    token = {"core": chunk, "p": chunk, "t": chunk, "w": p.K, "u": p.V} | dict.fromkeys(ROWS, p.K)
    specs = {name: ((*p.token_shape, n), p.dtype) for name, n in token.items()}
    decays = (p.B * p.chunk_slots(chunk), p.HV, p.K)
    specs["channel_decays"] = (decays, np.dtype(np.float32))
    launch = channel_factors_launch(p, chunk, made, beside)
    outputs = {name: specs[name] for name in specs if name in launch.arrays()}
    given = arrays | {"cu_seqlens": p.cu_seqlens}
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(Plan((launch,), outputs), given, device)
    return {name: np.array(results[name], np.float64) for name in outputs}


def check(p, arrays, made="core", **options):
    """Compare with float64: with unit keys no entry but of u is above 1, so errors are absolute."""
    results, exact = computed(p, arrays, made, **options), factors_of(p, arrays)
    for name, x in results.items():
        used = ~np.isnan(exact[name])
        off = np.abs(x - exact[name])[used]
        bound = 1e-6 if name == "channel_decays" else BOUND[p.dtype] * (4 if name == "u" else 1)
        assert np.max(off, initial=0) < bound, name
    return results


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize(
    ("T", "chunk", "K", "dtype", "options"),
    [
        (37, 16, 24, F32, dict(G=2)),
        (70, 32, 40, BF16, dict(H=2, B=2)),
        (101, 32, 16, F16, dict(cu_seqlens=VARLEN)),
        (101, 64, 17, BF16, dict(cu_seqlens=VARLEN, G=2)),
        (64, 64, 64, F32, dict()),
    ],
)
def test_shapes(T, chunk, K, dtype, options, leg):
    check(*make_case(T, chunk, K=K, dtype=dtype, **options), leg=leg)


@pytest.mark.parametrize(("dtype", "chunk"), [(BF16, 32), (F16, 32), (F32, 16), (BF16, 64)])
def test_decays_of_every_strength(dtype, chunk):
    T, K = 70, 20
    gates = np.stack([*patterns(T, K).values()], axis=1)[None]
    p, arrays = make_case(T, chunk, H=gates.shape[2], K=K, dtype=dtype, correlation=0.3)
    arrays["g"] = gates.astype(np.float32)
    results = check(p, arrays)
    for name in ("k_read", "q_read", "k_write", "channel_decays"):
        exact = factors_of(p, arrays)[name]
        exact = np.where(np.abs(exact) > (6.2e-5 if dtype == F16 else 1e-35), exact, np.nan)
        worst = np.nanmax(np.abs(results[name] / exact - 1))
        assert worst < (3e-7 if name == "channel_decays" else BOUND[dtype] * 1.001), (name, worst)


@pytest.mark.parametrize(
    ("made", "beside"), [("p", ("q_read",)), ("rows", ("k_write", "channel_decays"))]
)
@pytest.mark.parametrize("chunk", [16, 64])
def test_what_is_asked_for_alone(made, beside, chunk):
    p, arrays = make_case(70, chunk, K=40, G=2, dtype=BF16, cu_seqlens=[0, 5, 70])
    found = check(p, arrays, made, beside=beside)
    assert set(found) == set(beside) | ({"p"} if made == "p" else set())


@pytest.mark.parametrize(
    ("chunk", "dtype", "K", "V"), [(16, F32, 17, 40), (32, BF16, 64, 24), (64, F16, 32, 9)]
)
def test_public_factors(chunk, dtype, K, V):
    p, arrays = make_case(70, chunk, K=K, V=V, dtype=dtype, beta=(0, 2), cu_seqlens=[0, 5, 70])
    check(p, arrays, "wu", beside=("k_write", "channel_decays"))


@pytest.mark.parametrize("chunk", [16, 64])
def test_causal_to_the_bit_and_nan_stays(chunk):
    """Later gates change nothing of earlier tokens, not by their size, nor by being NaN."""
    p, arrays = make_case(70, chunk, K=32, H=2, dtype=BF16)
    first = computed(p, arrays, "core")
    for gate in (-1000.0, -3.0, np.nan):
        g = arrays["g"].copy()
        g[:, 40, 0, 5] = gate
        later = computed(p, arrays | dict(g=g), "core")
        for name in ("core", "p", "k_read", "q_read"):
            # NaN in a row of M is NaN times zero in others of its chunk.
            alike = 40 // chunk * chunk if name == "core" and np.isnan(gate) else 40
            assert np.array_equal(first[name][:, :alike], later[name][:, :alike]), name
            assert np.array_equal(first[name][:, :, 1], later[name][:, :, 1]), name
        assert np.isnan(later["p"][0, 40, 0]).any() == np.isnan(gate)
