"""The factors of a gate per key channel, alone, under the race-checking emulator."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorDevice, Run, copy_in
from helpers import make_inputs

from cupy_delta.cuda.portable.channel_factors import channel_factors_launch
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import Plan
from cupy_delta.problem import Problem

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
NAMES = ("q", "k", "v", "beta", "g")
ROWS = ("k_read", "q_read", "k_write")
# Empty and one-token sequences, ends within, at and right after a chunk and a block.
VARLEN = [0, 0, 1, 16, 33, 65, 97, 101]
# Half a unit in the last place of numbers up to 1, and as much for products of rounded factors.
BOUND = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2e-6}


def make_case(T, chunk, *, H=1, G=1, K=16, V=8, dtype=BF16, **options):
    """Return a problem and its arrays, as the kernel is given them."""
    options = dict(gate="channel") | options
    args, kw = make_inputs(T, H=H, G=G, K=K, V=V, dtype=dtype, **options)
    q, k, v, beta, g = args
    cu = kw["cu_seqlens"]
    cu = None if cu is None else np.asarray(cu, np.int64)
    N = len(q) if cu is None else len(cu) - 1
    call = dict(dtype=dtype, B=len(q), T=T, N=N, H=H, HV=H * G, K=K, V=V, gate="channel")
    p = Problem(kind="numpy", **call, cu_seqlens=cu, varlen=cu is not None, chunk_size=chunk)
    beta, g = beta.astype(np.float32), g.astype(np.float32)
    return p, dict(q=q, k=k, v=v, beta=beta, g=g)


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


def chunks(p):
    """Slot, batch row and rows of tokens of every chunk."""
    C, spans = p.chunk_size, [(b, 0, p.T, b * p.chunk_slots(p.chunk_size)) for b in range(p.B)]
    if p.cu_seqlens is not None:
        ends = enumerate(pairwise(map(int, p.cu_seqlens)))
        spans = [(0, start, stop, start // C + n) for n, (start, stop) in ends]
    for b, start, stop, slot in spans:
        for i, first in enumerate(range(start, stop, C)):
            yield slot + i, b, slice(first, min(first + C, stop))


def definition(p, arrays):
    """Return all arrays in float64."""
    q, k, v, beta, g = (np.asarray(arrays[name], np.float64) for name in NAMES)
    C = p.chunk_size
    sizes = {"core": C, "p": C, "t": C, "w": p.K, "u": p.V} | dict.fromkeys(ROWS, p.K)
    found = {name: np.zeros((*p.token_shape, size)) for name, size in sizes.items()}
    found["channel_decays"] = np.full((p.B * p.chunk_slots(C), p.HV, p.K), np.nan)
    for slot, b, rows in chunks(p):
        n = rows.stop - rows.start
        for hv in range(p.HV):
            h, at = hv // p.groups, (b, rows, hv)
            Q, X, V, weight = q[b, rows, h], k[b, rows, h], v[at], beta[at][:, None]
            G = np.cumsum(np.maximum(g[at], -1000), axis=0)
            D = np.exp(np.minimum(G[:, None] - G[None], 0))
            M = np.tril(np.einsum("ic,jc,ijc->ij", X, X, D), -1)
            inverse = np.linalg.inv(np.eye(n) + weight * M)
            t = inverse * weight.T
            here = {"k_read": np.exp(G) * X, "q_read": np.exp(G) * Q}
            here |= {"k_write": np.exp(G[-1] - G) * X, "core": -M @ inverse, "t": t}
            here |= {"p": np.tril(np.einsum("ic,jc,ijc->ij", Q, X, D))}
            here |= {"w": t @ here["k_read"], "u": t @ V}
            for name, x in here.items():
                found[name][at][:, : x.shape[1]] = x
            found["channel_decays"][slot, hv] = np.exp(G[-1])
    return found


def check(p, arrays, made="core", **options):
    """Compare with float64: with unit keys no entry but of u is above 1, so errors are absolute."""
    results, exact = computed(p, arrays, made, **options), definition(p, arrays)
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


def patterns(T, K):
    """Return gates of T tokens and K channels by name."""
    rng = np.random.default_rng(3)
    found = {f"mean {mean}": -mean * rng.exponential(size=(T, K)) for mean in (0.01, 0.1, 1, 5)}
    found["bound -5"] = -5 / (1 + np.exp(-4 * rng.standard_normal((T, K))))
    found["some channels forget"] = g = -0.01 * rng.exponential(size=(T, K))
    g[:, ::3] = -20
    for reset in (-20, -88, -1000, -np.inf):
        found[f"single resets of {reset}"] = g = -0.01 * rng.exponential(size=(T, K))
        for token in (0, 15, 16, 31, 32, 40):
            g[token, token % K] = reset
            g[token, :: token % 5 + 2] = reset
    found["all forgotten"] = np.full((T, K), -np.inf)
    return found


@pytest.mark.parametrize(("dtype", "chunk"), [(BF16, 32), (F16, 32), (F32, 16), (BF16, 64)])
def test_decays_of_every_strength(dtype, chunk):
    T, K = 70, 20
    gates = np.stack([*patterns(T, K).values()], axis=1)[None]
    p, arrays = make_case(T, chunk, H=gates.shape[2], K=K, dtype=dtype, correlation=0.3)
    arrays["g"] = gates.astype(np.float32)
    results = check(p, arrays)
    for name in ("k_read", "q_read", "k_write", "channel_decays"):
        exact = definition(p, arrays)[name]
        exact = np.where(np.abs(exact) > (6.2e-5 if dtype == F16 else 1e-35), exact, np.nan)
        worst = np.nanmax(np.abs(results[name] / exact - 1))
        assert worst < (3e-7 if name == "channel_decays" else BOUND[dtype] * 1.001), (name, worst)


@pytest.mark.parametrize(
    ("made", "beside"), [("p", ("q_read",)), ("rows", ("k_write", "channel_decays"))]
)
@pytest.mark.parametrize("chunk", [16, 64])
def test_what_is_asked_for_alone(made, beside, chunk):
    p, arrays = make_case(70, chunk, K=40, G=2, cu_seqlens=[0, 5, 70])
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
    p, arrays = make_case(70, chunk, K=32, H=2)
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
