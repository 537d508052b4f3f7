"""The WY pieces: their definitions, and that together they are the operator."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import deviation, make_inputs

import cupy_delta as cd

VARLEN = [0, 0, 1, 70, 70, 134, 199, 200]


def pieces(args, kw, chunk):
    q, k, v, beta, _ = args
    cu = kw["cu_seqlens"]
    w, u, t = cd.wy_factors(k, v, beta, chunk_size=chunk, cu_seqlens=cu)
    states, v_new, final = cd.state_pass(
        k, w, u, initial_state=kw["initial_state"], chunk_size=chunk, cu_seqlens=cu
    )
    o = cd.chunk_output(q, k, v_new, states, chunk_size=chunk, cu_seqlens=cu)
    return w, u, t, states, v_new, final, o


@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("chunk", [None, 16, 17])
@pytest.mark.parametrize("correlation", [0, 1])
def test_pieces_recompose_the_operator(T, chunk, correlation):
    args, kw = make_inputs(
        T, B=2, H=2, G=2, K=8, beta=(0, 2), correlation=correlation, initial=True
    )
    *_, final, o = pieces(args, kw, chunk)
    expected = cd.recurrent_delta_rule(*args, **kw)
    assert deviation(o, expected.o) < 1e-12
    assert deviation(final, expected.final_state) < 1e-12


@pytest.mark.parametrize("chunk", [None, 16, 17])
def test_pieces_recompose_sequences_end_to_end(chunk):
    args, kw = make_inputs(200, G=2, initial=True, cu_seqlens=VARLEN)
    *_, states, _, final, o = pieces(args, kw, chunk)
    expected = cd.recurrent_delta_rule(*args, **kw)
    assert deviation(o, expected.o) < 1e-12
    assert deviation(final, expected.final_state) < 1e-12
    C = chunk or 64
    assert states.shape[1] == 200 // C + 7
    used = {
        a // C + n + i
        for n, (a, z) in enumerate(itertools.pairwise(VARLEN))
        for i in range(-(-(z - a) // C))
    }
    unused = [i for i in range(states.shape[1]) if i not in used]
    assert unused
    assert not states[:, unused].any()
    assert np.array_equal(states[0, VARLEN[2] // C + 2], kw["initial_state"][2])


@pytest.mark.parametrize("last", [16, 5])
def test_factors_are_what_the_equations_say(last):
    (_q, k, v, beta, _), _ = make_inputs(16 + last, H=1, G=2, K=8, beta=(0, 2))
    w, u, t = cd.wy_factors(k, v, beta, chunk_size=16)
    for start, C in ((0, 16), (16, last)):
        for hv in range(2):
            rows = slice(start, start + C)
            K, V, b = k[0, rows, 0], v[0, rows, hv], beta[0, rows, hv]
            A = np.tril(np.diag(b) @ K @ K.T, -1)
            T = np.linalg.inv(np.eye(C) + A) @ np.diag(b)
            assert deviation(t[0, rows, hv, :C], T) < 1e-13
            assert not t[0, rows, hv, C:].any()
            assert deviation(w[0, rows, hv], T @ K) < 1e-13
            assert deviation(u[0, rows, hv], T @ V) < 1e-13


def test_transfer_is_the_product_of_householder_like_factors():
    args, kw = make_inputs(9, H=1, G=2, K=4, V=3, cu_seqlens=[0, 2, 2, 9])
    _, k, v, beta, _ = args
    p, h = cd.sequence_transfer(k, v, beta, cu_seqlens=kw["cu_seqlens"])
    for n, (start, stop) in enumerate(((0, 2), (2, 2), (2, 9))):
        for hv in range(2):
            P = np.eye(4)
            for t in range(start, stop):
                P = (np.eye(4) - beta[0, t, hv] * np.outer(k[0, t, 0], k[0, t, 0])) @ P
            assert deviation(p[n, hv], P) < 1e-14
    assert deviation(h, cd.chunk_delta_rule(*args, **kw).final_state) < 1e-14


@pytest.mark.parametrize("split", [0, 1, 64, 100, 150])
def test_transfers_compose_and_apply(split):
    args, kw = make_inputs(150, B=2, H=2, G=2, K=8, initial=True)
    _, k, v, beta, _ = args
    first = cd.sequence_transfer(k[:, :split], v[:, :split], beta[:, :split])
    later = cd.sequence_transfer(k[:, split:], v[:, split:], beta[:, split:])
    whole = cd.sequence_transfer(k, v, beta)
    both = first.then(later)
    assert deviation(both.p, whole.p) < 1e-13
    assert deviation(both.h, whole.h) < 1e-13
    final = cd.recurrent_delta_rule(*args, **kw).final_state
    assert deviation(whole.apply(kw["initial_state"]), final) < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(dtype):
    args, kw = make_inputs(70, H=2, K=8, dtype=dtype, initial=True)
    w, u, t, states, v_new, final, o = pieces(args, kw, None)
    assert {x.dtype for x in (w, u, t, v_new, o)} == {np.dtype(dtype)}
    assert {x.dtype for x in (states, final)} == {np.dtype(np.float32)}
    exact = cd.recurrent_delta_rule(*args, **kw)
    bound = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 3e-2}[np.dtype(dtype).name]
    assert deviation(o, exact.o) < bound
    transfer = cd.sequence_transfer(*args[1:4])
    assert transfer.p.dtype == transfer.h.dtype == np.float32


def test_chunk_axis_of_states_is_checked():
    args, kw = make_inputs(70)
    q, k, *_ = args
    *_, states, v_new, _, _ = pieces(args, kw, 16)
    with pytest.raises(ValueError, match="states: expected 2 chunks of chunk_size = 64"):
        cd.chunk_output(q, k, v_new, states)
