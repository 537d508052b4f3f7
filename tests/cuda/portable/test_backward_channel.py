"""The chunk-parallel gradients with a gate per key channel, alone, under the emulator.

What walks would leave is drawn at random: the kernel is right for any of it.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from channels import chunks, make_case, patterns
from emulator import EmulatorDevice, Run, copy_in
from rounded import error

from cupy_delta.cuda.portable.backward_channel import backward_channel_launch
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import Plan

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
SCALE = 0.3
# N and dR are rounded to the dtype, and results; float: 3xTF32.
BOUND = {BF16: 6e-3, F16: 8e-4, F32: 2e-6}


def walked(p, arrays):
    """Return the arrays with what walks leave."""
    rng, dtype = np.random.default_rng(11), p.dtype
    states = (p.B, p.chunk_slots(p.chunk_size), p.HV, p.V, p.K)
    for name in ("corrections", "dy", "do"):
        arrays[name] = rng.standard_normal(p.value_shape).astype(dtype)
    for name in ("states", "dstates"):
        arrays[name] = rng.standard_normal(states).astype(dtype)
    return arrays


def computed(p, arrays, run=None, leg="source"):
    device = EmulatorDevice(run or Run(), leg=leg)
    launch = backward_channel_launch(p, p.chunk_size, device.facts)
    single = np.dtype(np.float32)
    outputs = {"dq": (p.key_shape, p.dtype), "dk": (p.key_shape, p.dtype)}
    outputs |= {"dv": (p.value_shape, p.dtype), "dbeta": (p.token_shape, single)}
    outputs["dg"] = ((*p.token_shape, p.K), single)
    given = arrays | {"cu_seqlens": p.cu_seqlens}
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(Plan((launch,), outputs), given, device)
    return {name: np.array(results[name], np.float64) for name in outputs}


def definition(p, arrays):
    """Return the gradients in float64, from the equations."""
    x = {n: None if a is None else np.asarray(a, np.float64) for n, a in arrays.items()}
    dq, dk = np.zeros(p.key_shape), np.zeros(p.key_shape)
    dv, dbeta = np.zeros(p.value_shape), np.zeros(p.token_shape)
    dg = np.zeros((*p.token_shape, p.K))
    slots = p.chunk_slots(p.chunk_size)
    for slot, b, rows in chunks(p):
        n = rows.stop - rows.start
        for hv in range(p.HV):
            h, at, state = hv // p.groups, (b, rows, hv), (slot // slots, slot % slots, hv)
            Q, K, O, Y = x["q"][b, rows, h], x["k"][b, rows, h], x["do"][at], x["dy"][at]
            weight, S, dS = x["beta"][at][:, None], x["states"][state], x["dstates"][state]
            G = np.cumsum(np.maximum(x["g"][at], -1000), axis=0)
            D = np.exp(np.minimum(G[:, None] - G[None], 0)) * np.tri(n)[..., None]
            N, dR = weight * x["corrections"][at], weight * Y
            dv[at], dbeta[at] = dR, np.sum(Y * x["corrections"][at], -1)
            dP, E = SCALE * np.tril(O @ N.T), -np.tril(dR @ N.T, -1)
            reads_q, reads_k = SCALE * np.exp(G) * (O @ S), -np.exp(G) * (dR @ S)
            writes = np.exp(G[-1] - G) * (N @ dS)
            by_q, by_k = dP[..., None] * D, E[..., None] * D
            dq[b, rows, h] += reads_q + np.einsum("ijc,jc->ic", by_q, K)
            dk[b, rows, h] += reads_k + writes + np.einsum("ijc,jc->ic", by_k, K)
            dk[b, rows, h] += np.einsum("ijc,ic->jc", by_q, Q) + np.einsum("ijc,ic->jc", by_k, K)
            Z = (by_q * Q[:, None] + by_k * K[:, None]) * K[None]
            rho, omega = Q * reads_q + K * reads_k, K * writes
            through = np.exp(G[-1]) * np.sum(S * dS, axis=0)
            for t in range(n):
                dg[(*at, slice(None))][t] = (
                    Z[t:, :t].sum((0, 1)) + rho[t:].sum(0) + omega[:t].sum(0) + through
                )
    return dict(dq=dq, dk=dk, dv=dv, dbeta=dbeta, dg=dg)


def check(p, arrays, **options):
    results, exact = computed(p, arrays, **options), definition(p, arrays)
    for name, x in results.items():
        assert error(x, exact[name]) < BOUND[p.dtype], name
    return results, exact


def case(*args, **options):
    p, arrays = make_case(*args, **options)
    p = replace(p, scale=SCALE)
    return p, walked(p, arrays)


@pytest.mark.parametrize("leg", ["source", "ptx"])
@pytest.mark.parametrize(
    ("T", "chunk", "K", "V", "dtype", "options"),
    [
        (37, 16, 24, 17, F32, dict(G=2)),
        (70, 32, 80, 24, BF16, dict(H=2, B=2)),
        (101, 32, 16, 40, F16, dict(cu_seqlens=[0, 0, 1, 16, 33, 65, 97, 101])),
        (70, 64, 17, 72, BF16, dict(cu_seqlens=[0, 5, 70], G=2)),
        (64, 64, 64, 16, F32, dict()),
    ],
)
def test_shapes(T, chunk, K, V, dtype, options, leg):
    check(*case(T, chunk, K=K, V=V, dtype=dtype, beta=(0, 2), **options), leg=leg)


@pytest.mark.parametrize(("dtype", "chunk"), [(BF16, 32), (F32, 16), (F32, 64)])
def test_every_gate_by_itself(dtype, chunk):
    """Of every token and channel, however small its gradient is; that of -inf is zero."""
    T, K = 70, 20
    gates = np.stack([*patterns(T, K).values()], axis=1)[None].astype(np.float32)
    p, arrays = case(T, chunk, H=gates.shape[2], K=K, V=16, dtype=dtype)
    arrays["g"] = gates
    results, exact = check(p, arrays)
    for h in range(p.HV):
        for name in ("dq", "dk", "dg"):
            assert error(results[name][:, :, h], exact[name][:, :, h]) < BOUND[dtype], (name, h)
    dg, right = results["dg"], exact["dg"]
    assert not dg[gates <= -1000].any()
    small = (gates <= -5) & (gates > -80)
    # Sums of terms of both signs, each rounded: judged against what a term can be.
    off = np.abs(dg - right)[small] / np.exp(gates[small].astype(np.float64))
    assert np.max(off) < 100 * BOUND[dtype]
