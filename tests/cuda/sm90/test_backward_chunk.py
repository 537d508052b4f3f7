"""The gradients of chunks on compute capability 9.0, alone, under the race-checking emulator."""

from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import make_inputs, unit
from rounded import error, twice, wide

import cupy_delta as cd
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90 import backward
from cupy_delta.cuda.sm90.tiles import CHUNK
from cupy_delta.cuda.sm90.training import DECAY_ROWS, leaves_dv
from cupy_delta.cuda.spec import DeviceFacts, Plan
from cupy_delta.cuda.variants import launches_of
from cupy_delta.problem import Problem

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Empty and one-token sequences, ends within, at and right after a chunk.
VARLEN = [0, 0, 1, 64, 128, 193, 200]
# Below, dY does not follow from b dY.
SMALL = 2.0**-24
LEGS = ["source", "ptx"]
GRADIENTS = ("dq", "dk", "dv", "dbeta")
SUMS = ("dbeta", "dg")  # in float32


def names(p):
    gradients = tuple(x for x in GRADIENTS if x != "dv" or not leaves_dv(p))
    return gradients if p.gate is None else (*gradients, "dg")


def make_case(
    T,
    *,
    B=1,
    H=1,
    G=1,
    K=64,
    V=64,
    dtype=BF16,
    cu_seqlens=None,
    beta=(0, 1),
    correlation=0.0,
    gates=None,
):
    """Return a problem and what the two walks would have left for it, drawn at random.

    `gates` are log decays per token, or the mean of random ones.
    """
    rng = np.random.default_rng(0)
    HV = H * G
    cu = None if cu_seqlens is None else np.array(cu_seqlens, np.int64)
    N = B if cu is None else len(cu) - 1
    common = np.sqrt(correlation) * rng.standard_normal(K)
    q, k = (
        unit(common + np.sqrt(1 - correlation) * rng.standard_normal((B, T, H, K)))
        for _ in range(2)
    )
    sizes = dict(B=B, T=T, N=N, H=H, HV=HV, K=K, V=V)
    p = Problem(
        kind="numpy",
        dtype=dtype,
        **sizes,
        cu_seqlens=cu,
        varlen=cu is not None,
        scale=K**-0.5,
        chunk_size=CHUNK,
        gate=None if gates is None else "scalar",
    )
    rows, states = (B, T, HV, V), (B * p.chunk_slots(CHUNK), HV, V, K)
    arrays = dict(q=q, k=k)
    arrays |= {name: rng.standard_normal(rows) for name in ("corrections", "dy", "do")}
    arrays |= {name: 0.3 * rng.standard_normal(states) for name in ("states", "dstates")}
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    arrays["beta"] = rng.uniform(*beta, (B, T, HV)).astype(np.float32)
    if gates is not None:
        random = -rng.exponential(size=(B, T, HV))
        g = gates * random if np.ndim(gates) == 0 else np.broadcast_to(gates[:, None], (B, T, HV))
        arrays["decays"] = decay_rows(p, g)
        # By which nothing can be divided.
        arrays["beta"][:, 45::128], arrays["beta"][:, 69::128] = 0, -1e-9
    return p, arrays


def left_by_the_walk(p, arrays):
    """Of dY, what the reverse walk leaves: b dY, which is dV, and itself where b is too small."""
    if not leaves_dv(p):
        return arrays
    b, dy = arrays["beta"][..., None], arrays["dy"]
    dv = (b * dy.astype(np.float32)).astype(p.dtype)
    return arrays | dict(dv=dv, dy=np.where(abs(b) < SMALL, dy, np.nan).astype(p.dtype))


def decay_rows(p, g):
    """Decays of all chunks as the factors leave them."""
    shape = (p.B * p.chunk_slots(CHUNK), p.HV, DECAY_ROWS, CHUNK)
    decays = np.full(shape, np.nan, np.float32)
    for b, rows, slot in chunks(p):
        G = np.cumsum(np.maximum(g[b, rows], -1000.0), axis=0).T
        G = np.pad(G, ((0, 0), (0, CHUNK - G.shape[1])), mode="edge")
        exponents = G / np.log(2)
        high = exponents.astype(np.float32)
        decays[slot] = np.stack([np.exp(G), np.exp(G[:, -1:] - G), high, exponents - high], axis=1)
    return decays


def computed(p, arrays, *, leg="source", blocks=2, run=None):
    """Run the kernel on `blocks` multiprocessors; what it does not write has all bits set."""
    device = EmulatorDevice(run or Run(), leg=leg, **(HOPPER | dict(sm_count=blocks)))
    launch = backward.backward_chunk_hopper_launch(p, device.facts)
    rows = {"dq": (p.H, p.K), "dk": (p.H, p.K), "dv": (p.HV, p.V), "dbeta": (p.HV,), "dg": (p.HV,)}
    outputs = {
        name: ((p.B, p.T, *rows[name]), np.dtype(np.float32) if name in SUMS else p.dtype)
        for name in names(p)
    }
    given = {name: copy_in(x, name) for name, x in left_by_the_walk(p, arrays).items()}
    given["cu_seqlens"] = None if p.cu_seqlens is None else copy_in(p.cu_seqlens, "cu_seqlens")
    results = execute(Plan((launch,), outputs), given, device)
    return {name: np.array(results[name]) for name in outputs}


def chunks(p):
    """Batch row, rows of tokens and slot of every chunk."""
    spans = [(b, 0, p.T, b * p.chunk_slots(CHUNK)) for b in range(p.B)]
    if p.cu_seqlens is not None:
        ends = map(int, p.cu_seqlens)
        spans = [(0, a, z, a // CHUNK + n) for n, (a, z) in enumerate(pairwise(ends))]
    for b, start, stop, slot in spans:
        for i, first in enumerate(range(start, stop, CHUNK)):
            yield b, slice(first, min(first + CHUNK, stop)), slot + i


def definition(p, arrays, rounding):
    """The gradients in float64 from the equations; operands of products go through `rounding`."""
    x = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    out = {"dq": np.zeros(x["q"].shape), "dk": np.zeros(x["k"].shape)}
    out |= {"dv": np.zeros(x["do"].shape)}
    out |= {name: np.zeros(x["beta"].shape) for name in SUMS}

    def mul(a, b):
        return rounding(a) @ rounding(b)

    for b, rows, slot in chunks(p):
        n = rows.stop - rows.start
        for hv in range(p.HV):
            h = hv // (p.HV // p.H)
            Q, X = x["q"][b, rows, h], x["k"][b, rows, h]
            dO, G, N_hat = (x[name][b, rows, hv] for name in ("do", "dy", "corrections"))
            S, D = x["states"][slot, hv], x["dstates"][slot, hv]
            c = x["beta"][b, rows, hv, None]
            reads = writes = between = 1.0
            if p.gate is not None:
                reads, writes, high, low = x["decays"][slot, hv, :, :n]
                sums = high + low
                between = np.exp2(np.minimum(sums[:, None] - sums, 0))
                reads, writes = reads[:, None], writes[:, None]
            N, dR = c * N_hat, c * G
            dP = np.tril(mul(dO, N.T) * between)
            E = -np.tril(mul(dR, N.T) * between, -1)
            of_queries, of_keys = reads * mul(dO, S), reads * mul(dR, S)
            written = writes * mul(N, D)
            out["dq"][b, rows, h] += p.scale * (of_queries + mul(dP, X))
            out["dk"][b, rows, h] += mul(p.scale * dP.T, Q) + written - of_keys
            out["dk"][b, rows, h] += mul(E + E.T, X)
            out["dv"][b, rows, hv] = dR
            if leaves_dv(p):
                divided = np.abs(c) >= SMALL
                G = np.where(divided, rounding(dR) / np.where(divided, c, 1), G)
            out["dbeta"][b, rows, hv] = np.sum(G * N_hat, 1)
            if p.gate is None:
                continue
            Z = p.scale * dP * mul(Q, X.T) + E * mul(X, X.T)
            rho = np.sum(p.scale * of_queries * Q - of_keys * X, axis=1)
            omega = np.sum(written * X, axis=1)
            state = x["decays"][slot, hv, 0, -1] * np.sum(S * D)
            for t in range(n):
                pairs = np.sum(Z[t:, :t])
                dg = pairs + np.sum(rho[t:]) + np.sum(omega[:t]) + state
                out["dg"][b, rows.start + t, hv] = dg
    return out


def check(p, arrays, **options):
    """Compare with float64: within 2x of plain rounded products."""
    result = computed(p, arrays, **options)
    exact = definition(p, arrays, lambda a: a)
    plain = definition(p, arrays, lambda a: a.astype(p.dtype).astype(np.float64))
    for name in names(p):
        rounded = plain[name].astype(np.float32 if name in SUMS else p.dtype)
        assert error(result[name], exact[name]) < twice(rounded, exact[name]), name
    return result


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths(leg, T):
    check(*make_case(T, B=2, G=2, K=128, V=128, beta=(0, 2)), leg=leg)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("K", "V", "dtype"), [(64, 64, F16), (8, 200, BF16), (96, 72, BF16)])
def test_head_sizes(leg, K, V, dtype):
    check(*make_case(65, H=2, G=3, K=K, V=V, dtype=dtype), leg=leg)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("G", "gates"), [(1, None), (2, None), (2, 0.2)])
def test_sequences_of_any_lengths(leg, G, gates):
    check(*make_case(200, G=G, K=96, V=72, cu_seqlens=VARLEN, gates=gates), leg=leg)


RESETS = {0: -30, 3: -20.0, 17: -88.0, 40: -np.inf, 63: -1000.0, 64: -np.inf, 127: -np.inf}
PATTERNS = {
    "resets": [RESETS.get(t, -0.01) for t in range(130)],
    "-20": [-20.0] * 130,
    "-inf": [-np.inf] * 130,
}


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("T", [1, 65, 130])
def test_lengths_with_a_gate(leg, T):
    check(*make_case(T, B=2, G=2, K=128, V=128, beta=(0, 2), gates=0.1), leg=leg)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_strong_gates(leg, pattern):
    """No dg is lost in larger ones: each within 1 % of float64, and of -inf it is zero."""
    g = np.array(PATTERNS[pattern])
    p, arrays = make_case(130, H=2, G=3, K=64, V=96, gates=g)
    result = check(p, arrays, leg=leg)
    exact = definition(p, arrays, lambda a: a)["dg"]
    size = np.linalg.norm(exact, axis=(0, 2))
    assert np.all(np.linalg.norm(result["dg"] - exact, axis=(0, 2)) <= 0.01 * size + 1e-36)
    assert not result["dg"][:, np.isneginf(g)].any()


@pytest.mark.parametrize("leg", LEGS)
def test_only_what_a_gate_decays_has_part_in_its_gradient(leg):
    """Of the first token reads and the state, of the others what lies before them, too."""
    p, arrays = make_case(64, gates=np.r_[-0.5, np.zeros(62), -np.inf])
    arrays["states"][...] = 0
    arrays["corrections"][:, 32:] = 0
    result = check(p, arrays, leg=leg)
    assert not result["dg"][:, 0].any()
    assert result["dg"][:, 1:63].all()


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("beta", "correlation"), [((0, 0), 0), ((2, 2), 0.9)])
def test_limits_of_beta(leg, beta, correlation):
    result = check(*make_case(130, dtype=F16, beta=beta, correlation=correlation), leg=leg)
    assert np.any(result["dbeta"])


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("gates", [None, 0.2])
def test_what_a_block_has_done_before_does_not_matter(leg, gates):
    """Blocks for all, one or three chunks and heads, and events in any order: the same bits."""
    p, arrays = make_case(200, H=2, G=2, K=96, V=72, cu_seqlens=VARLEN, gates=gates)
    first = computed(p, arrays, leg=leg, blocks=132)
    runs = [(1, Run()), (3, Run(schedule="descending", completion="early"))]
    runs += [(2, Run(schedule="random", completion="either", preempt=30, seed=5))]
    for blocks, run in runs:
        other = computed(p, arrays, leg=leg, blocks=blocks, run=run)
        for name in names(p):
            assert first[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("gates", [None, 0.2])
def test_neighbours_do_not_matter(leg, gates):
    """NaN right after a ragged chunk, and in slots of no other chunk, leaves the others' bits."""
    p, arrays = make_case(200, K=96, V=72, cu_seqlens=VARLEN, gates=gates)
    clean = computed(p, arrays, leg=leg)
    used = [slot for _, rows, slot in chunks(p) if rows.start != 64]
    spoilt = {name: x.copy() for name, x in arrays.items()}
    for name, x in spoilt.items():
        if name.endswith("states") or name == "decays":
            x[np.setdiff1d(range(len(x)), used)] = np.nan
        else:
            x[:, 64:128] = np.nan
    result = computed(p, spoilt, leg=leg)
    others = np.r_[0:64, 128:200]
    for name in names(p):
        assert result[name][:, others].tobytes() == clean[name][:, others].tobytes(), name
        assert np.isnan(result[name][:, 64:128].astype(float)).all(), name


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("gates", [None, 0.2])
def test_tokens_of_no_sequence_are_left_alone(leg, gates):
    p, arrays = make_case(200, K=96, V=72, cu_seqlens=[3, 70, 150], gates=gates)
    result = computed(p, arrays, leg=leg)
    for name in names(p):
        outside = np.ascontiguousarray(result[name][:, np.r_[0:3, 150:200]])
        assert np.all(outside.view(np.uint8) == 255), name
        assert np.isfinite(result[name][:, 3:150].astype(float)).all(), name


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("ends", [[0, 500, 900, -4], [-100, 50, 2**40, 200], [200, 0, 0, 0]])
def test_wrong_ends_of_sequences_stay_within_the_arrays(leg, ends):
    p, arrays = make_case(200, K=96, V=72, cu_seqlens=ends)
    computed(p, arrays, leg=leg, blocks=1)
    shape = (p.chunk_slots(CHUNK), p.HV, DECAY_ROWS, CHUNK)
    arrays["decays"] = np.zeros(shape, np.float32)
    computed(replace(p, gate="scalar"), arrays, leg=leg, blocks=1)


def test_gradients_of_a_call(emulated, on_reference):
    """From the forward's residuals, as the operators do it."""
    emulated(**HOPPER)
    args, kw = make_inputs(130, G=2, K=64, V=64, dtype=BF16, initial=True, layout="vk")
    rng = np.random.default_rng(6)
    do = rng.standard_normal(args[2].shape).astype(BF16)
    dfinal = rng.standard_normal(kw["initial_state"].shape).astype(np.float32)

    def gradients(args, kw, do, dfinal):
        forward = cd.chunk_delta_rule_fwd(*args, **kw, chunk_size=CHUNK)
        return cd.chunk_delta_rule_bwd(forward.residuals, do, dfinal)

    result = gradients(args, kw, do, dfinal)
    if emulated.devices is not None:
        entries = [x.entry for x in emulated.devices[-1].launches]
        assert entries[-1] == "backward_chunk_hopper"
    wide_args, wide_kw = wide(args, kw)
    exact = on_reference(gradients, wide_args, wide_kw, do.astype(float), dfinal.astype(float))
    for x, y in zip(result, exact, strict=True):
        if y is not None:
            assert error(x, y) < 0.01


H200 = DeviceFacts(132, 227 * 1024, (9, 0))


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (dict(dtype="float32"), H200),
        (dict(K=256), H200),
        (dict(V=100), H200),
        (dict(chunk_size=32), H200),
        (dict(), DeviceFacts(148, 227 * 1024, (10, 0))),
        (dict(), DeviceFacts(108, 163 * 1024, (8, 0))),
    ],
)
def test_what_does_not_fit_goes_to_the_portable_kernel(call, facts):
    call = dict(dtype="bfloat16", K=128, V=128, chunk_size=64) | call
    entries = [x.entry for x in launches_of(facts, ("backward",), **call)]
    assert "backward_chunk" in entries
    assert "backward_chunk_hopper" not in entries
