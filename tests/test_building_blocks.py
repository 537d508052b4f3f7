"""The WY pieces: their definitions, and that together they are the operator."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import deviation, make_inputs

import cupy_delta as cd

VARLEN = [0, 0, 1, 70, 70, 134, 199, 200]


def pieces(args, kw, chunk, **options):
    q, k, v, beta, g = args
    options |= dict(chunk_size=chunk, cu_seqlens=kw["cu_seqlens"])
    scale = options.pop("scale", None)
    w, u, t = cd.wy_factors(k, v, beta, g, **options)
    states, v_new, final = cd.state_pass(k, w, u, g, initial_state=kw["initial_state"], **options)
    o = cd.chunk_output(q, k, v_new, states, g, scale=scale, **options)
    return w, u, t, states, v_new, final, o


def with_resets(g):
    """Gates with strong ones among them: one that forgets all, one that leaves almost nothing."""
    g[:, 1::9] = -np.inf
    g[:, 5::17] = -20.0
    return g


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


@pytest.mark.parametrize("T", [0, 1, 64, 130])
@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("decay", [0.3, 20.0, np.inf, "resets"])
def test_pieces_recompose_with_gates(T, chunk, gate, decay):
    mean = 0.3 if decay == "resets" else decay
    args, kw = make_inputs(T, B=2, H=2, G=2, K=8, gate=gate, decay=mean, beta=(0, 2), initial=True)
    if decay == "resets":
        with_resets(args[4])
    *_, final, o = pieces(args, kw, chunk)
    expected = cd.recurrent_delta_rule(*args, **kw)
    assert deviation(o, expected.o) < 1e-12
    assert deviation(final, expected.final_state) < 1e-12


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("scale", [None, 0.0, -2.5])
def test_pieces_normalise_and_scale_like_the_operator(gate, scale):
    args, kw = make_inputs(70, H=2, G=2, K=8, gate=gate, initial=True)
    args[0], args[1] = 3 * args[0], 0.5 * args[1]
    options = dict(qk_l2norm=True, scale=scale)
    *_, final, o = pieces(args, kw, 16, **options)
    expected = cd.recurrent_delta_rule(*args, **kw, **options)
    assert deviation(o, expected.o) < 1e-12
    assert deviation(final, expected.final_state) < 1e-12
    _, k, v, beta, g = args
    transfer = cd.sequence_transfer(k, v, beta, g, qk_l2norm=True)
    assert deviation(transfer.apply(kw["initial_state"]), expected.final_state) < 1e-12


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_pieces_are_in_the_units_of_the_operator(gate):
    """States between chunks and corrections are those of the token loop, with nothing factored."""
    args, kw = make_inputs(50, G=2, K=8, gate=gate, initial=True)
    with_resets(args[4])
    _, _, _, states, v_new, _, _ = pieces(args, kw, 16)
    S = kw["initial_state"]
    for t in range(50):
        if t % 16 == 0:
            assert deviation(states[:, t // 16], S) < 1e-12
        token = [x[:, t : t + 1] for x in args]
        _, k, v, beta, g = (x[0, 0] for x in token)
        decayed = np.exp(g).reshape(2, -1, 1) * S[0]
        error = v - np.einsum("c,hcv->hv", k[0], decayed)
        assert deviation(v_new[0, t], beta[:, None] * error) < 1e-12
        S = cd.recurrent_delta_rule(*token, initial_state=S).final_state


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_factors_with_a_gate_are_what_the_equations_say(gate):
    (_, k, v, beta, g), _ = make_inputs(21, H=1, G=2, K=8, gate=gate, beta=(0, 2))
    with_resets(g)
    w, u, t = cd.wy_factors(k, v, beta, g, chunk_size=16)
    for start, C in ((0, 16), (16, 5)):
        for hv in range(2):
            rows = slice(start, start + C)
            K, V, b = k[0, rows, 0], v[0, rows, hv], beta[0, rows, hv]
            steps = np.exp(g[0, rows, hv].reshape(C, -1)) * np.ones(8)
            # Products of the gates between two tokens, none of them from a difference of sums.
            D = np.array([[steps[j + 1 : i + 1].prod(0) for j in range(C)] for i in range(C)])
            A = np.tril(b[:, None] * np.einsum("ic,jc,ijc->ij", K, K, D), -1)
            T = np.linalg.inv(np.eye(C) + A) @ np.diag(b)
            assert deviation(t[0, rows, hv, :C], T) < 1e-12
            assert deviation(w[0, rows, hv], T @ (np.cumprod(steps, axis=0) * K)) < 1e-12
            assert deviation(u[0, rows, hv], T @ V) < 1e-12


@pytest.mark.parametrize("chunk", [None, 16, 17])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_pieces_recompose_sequences_end_to_end(chunk, gate):
    args, kw = make_inputs(200, G=2, initial=True, gate=gate, cu_seqlens=VARLEN)
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


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_transfer_with_a_gate_is_the_product_of_the_token_maps(gate):
    args, kw = make_inputs(9, H=1, G=2, K=4, V=3, gate=gate, decay=2.0, cu_seqlens=[0, 2, 2, 9])
    args[4][0, 5, 1] = -np.inf
    _, k, v, beta, g = args
    p, h = cd.sequence_transfer(k, v, beta, g, cu_seqlens=kw["cu_seqlens"])
    for n, (start, stop) in enumerate(((0, 2), (2, 2), (2, 9))):
        for hv in range(2):
            P = np.eye(4)
            for t in range(start, stop):
                decay = np.exp(g[0, t, hv]) * np.ones(4)
                key = k[0, t, 0]
                P = (np.eye(4) - beta[0, t, hv] * np.outer(key, key)) @ np.diag(decay) @ P
            assert deviation(p[n, hv], P) < 1e-14
    assert not p[2, 1].any()
    assert deviation(h, cd.chunk_delta_rule(*args, **kw).final_state) < 1e-14


@pytest.mark.parametrize("split", [0, 1, 64, 100, 150])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_transfers_compose_and_apply(split, gate):
    args, kw = make_inputs(150, B=2, H=2, G=2, K=8, gate=gate, decay=0.02, initial=True)
    first, later, whole = (
        cd.sequence_transfer(*(None if x is None else x[:, part] for x in args[1:]))
        for part in (slice(0, split), slice(split, None), slice(None))
    )
    both = first.then(later)
    assert deviation(both.p, whole.p) < 1e-13
    assert deviation(both.h, whole.h) < 1e-13
    final = cd.recurrent_delta_rule(*args, **kw).final_state
    assert deviation(whole.apply(kw["initial_state"]), final) < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_dtypes(dtype, gate):
    args, kw = make_inputs(70, H=2, K=8, gate=gate, dtype=dtype, initial=True)
    w, u, t, states, v_new, final, o = pieces(args, kw, None)
    assert {x.dtype for x in (w, u, t, v_new, o)} == {np.dtype(dtype)}
    assert {x.dtype for x in (states, final)} == {np.dtype(np.float32)}
    exact = cd.recurrent_delta_rule(*args, **kw)
    bound = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 3e-2}[np.dtype(dtype).name]
    assert deviation(o, exact.o) < bound
    transfer = cd.sequence_transfer(*args[1:])
    assert transfer.p.dtype == transfer.h.dtype == np.float32


def test_chunk_axis_of_states_is_checked():
    args, kw = make_inputs(70)
    q, k, *_ = args
    *_, states, v_new, _, _ = pieces(args, kw, 16)
    with pytest.raises(ValueError, match="states: expected 2 chunks of chunk_size = 64"):
        cd.chunk_output(q, k, v_new, states)
