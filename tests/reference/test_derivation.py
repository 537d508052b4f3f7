"""The numbered equations of docs/derivation.md, evaluated in float64."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import deviation, make_inputs

import cupy_delta as cd
from cupy_delta.problem import operator_problem
from cupy_delta.reference.adjoint import recurrent_delta_rule_bwd
from cupy_delta.reference.decay import ChannelDecay

C, K, V = 16, 6, 5
SCALE = K**-0.5
EXACT = 1e-13


@pytest.fixture(scope="module")
def chunk():
    """One chunk with a zero beta and betas up to 2, its token loop, and the matrices."""
    args, kw = make_inputs(C, K=K, V=V, beta=(0, 2), initial=True)
    args[3][0, 3] = 0.0
    q, k, v, b = (x[0, :, 0] for x in args[:4])
    S0 = kw["initial_state"][0, 0]
    loop = cd.recurrent_delta_rule(*args, **kw)
    M = np.tril(k @ k.T, -1)
    X = np.linalg.inv(np.eye(C) + np.diag(b) @ M)
    names = dict(args=args, kw=kw, q=q, k=k, v=v, b=b[:, None], S0=S0, M=M, X=X)
    names |= dict(o=loop.o[0, :, 0], SC=loop.final_state[0, 0], R=v - k @ S0)
    return names | dict(N=X @ (b[:, None] * (v - k @ S0)), T=X @ np.diag(b))


def test_equation_2_is_the_recurrence(chunk):
    S = chunk["S0"]
    for k, v, b in zip(chunk["k"], chunk["v"], chunk["b"][:, 0], strict=True):
        S = (np.eye(K) - b * np.outer(k, k)) @ S + b * np.outer(k, v)
    assert deviation(S, chunk["SC"]) < EXACT


def test_equations_3_and_4_the_corrections(chunk):
    S = chunk["S0"]
    for t in range(C):
        k, v, b = chunk["k"][t], chunk["v"][t], chunk["b"][t, 0]
        assert deviation(chunk["N"][t], b * (v - S.T @ k)) < EXACT
        S = chunk["S0"] + chunk["k"][: t + 1].T @ chunk["N"][: t + 1]
    assert deviation(S, chunk["SC"]) < EXACT


def test_equations_5_to_7_the_wy_factors(chunk):
    w, u, t = cd.wy_factors(*chunk["args"][1:4], chunk_size=C)
    assert deviation(t[0, :, 0], chunk["T"]) < EXACT
    W, U = w[0, :, 0], u[0, :, 0]
    assert deviation(W, chunk["T"] @ chunk["k"]) < EXACT
    assert deviation(U, chunk["T"] @ chunk["v"]) < EXACT
    assert deviation(U - W @ chunk["S0"], chunk["N"]) < EXACT
    P, H = np.eye(K) - chunk["k"].T @ W, chunk["k"].T @ U
    assert deviation(P @ chunk["S0"] + H, chunk["SC"]) < EXACT


def test_equations_8_and_9_the_transfer(chunk):
    P = np.eye(K)
    for k, b in zip(chunk["k"], chunk["b"][:, 0], strict=True):
        P = (np.eye(K) - b * np.outer(k, k)) @ P
    k, v, beta = chunk["args"][1:4]
    whole = cd.sequence_transfer(k, v, beta)
    assert deviation(whole.p[0, 0], P) < EXACT
    (p1, h1), (p2, h2) = (
        cd.sequence_transfer(k[:, part], v[:, part], beta[:, part])
        for part in (slice(0, 7), slice(7, C))
    )
    assert deviation(p2 @ p1, whole.p) < EXACT
    assert deviation(p2 @ h1 + h2, whole.h) < EXACT


def test_equation_10_the_outputs(chunk):
    P = np.tril(chunk["q"] @ chunk["k"].T)
    assert deviation(SCALE * (chunk["q"] @ chunk["S0"] + P @ chunk["N"]), chunk["o"]) < EXACT


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_equation_11_the_gates(gate):
    args, kw = make_inputs(C, K=K, V=V, gate=gate, initial=True)
    final = cd.recurrent_delta_rule(*args, **kw).final_state[0, 0]
    k, v, b, g = (x[0, :, 0] for x in args[1:])
    G = np.cumsum(g if g.ndim == 2 else np.repeat(g[:, None], K, axis=1), axis=0)
    pairs = np.exp(np.where(np.tri(C)[..., None] > 0, G[:, None] - G[None], -np.inf))
    A = b[:, None] * np.tril(np.einsum("ic,jc,ijc->ij", k, k, pairs), -1)
    S0 = kw["initial_state"][0, 0]
    N = np.linalg.solve(np.eye(C) + A, b[:, None] * (v - (k * np.exp(G)) @ S0))
    S = np.exp(G[-1])[:, None] * S0 + (k * np.exp(G[-1] - G)).T @ N
    assert deviation(S, final) < EXACT


def test_equation_12_halving_the_chunk():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 1, 1, 21, K))
    G = -np.cumsum(rng.exponential(5, (1, 1, 1, 21, K)), axis=3)
    decay = ChannelDecay(G, np.dtype(np.float64))
    pairs = np.exp(np.where(np.tri(21)[..., None] > 0, G[0, 0, 0, :, None] - G[0, 0, 0], -np.inf))
    direct = np.einsum("ic,jc,ijc->ij", a[0, 0, 0], b[0, 0, 0], pairs)
    assert deviation(decay.pairs(a, b)[0, 0, 0], direct) < EXACT


def test_equations_13_to_19_the_gradients(chunk):
    rng = np.random.default_rng(1)
    do, dS = rng.standard_normal((C, V)), rng.standard_normal((K, V))
    k, S0, N, R, M, b = (chunk[name] for name in ("k", "S0", "N", "R", "M", "b"))
    q = SCALE * chunk["q"]
    dN = np.tril(q @ k.T).T @ do + k @ dS
    dY = chunk["X"].T @ dN
    dR = b * dY
    N_hat = R - M @ N
    assert deviation(b * N_hat, N) < EXACT
    dPqk, E = np.tril(do @ N.T), -np.tril(dR @ N.T, -1)
    gradients = (
        SCALE * (do @ S0.T + dPqk @ k),
        dPqk.T @ q + N @ dS.T - dR @ S0.T + (E + E.T) @ k,
        dR,
        np.sum(dY * N_hat, axis=1),
        dS + q.T @ do - k.T @ dR,
    )
    options = dict(scale=None, qk_l2norm=False, out=None)
    problem = operator_problem(*chunk["args"], **chunk["kw"], **options)
    exact = recurrent_delta_rule_bwd(problem, do[None, :, None], dS[None, None])
    exact = [x for x in exact if x is not None]
    for gradient, expected in zip(gradients, exact, strict=True):
        assert deviation(gradient, expected.reshape(gradient.shape)) < 1e-12


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("decay", [0.3, 20.0])
def test_equation_20_the_gradient_of_the_gate(gate, decay):
    args, kw = make_inputs(C, K=K, V=V, gate=gate, decay=decay, initial=True)
    rng = np.random.default_rng(1)
    do, dS = rng.standard_normal((C, V)), rng.standard_normal((K, V))
    q, k, v, b, g = (x[0, :, 0] for x in args)
    q, S0 = SCALE * q, kw["initial_state"][0, 0]
    G = np.cumsum(g if g.ndim == 2 else np.repeat(g[:, None], K, axis=1), axis=0)
    pairs = np.exp(np.where(np.tri(C)[..., None] > 0, G[:, None] - G[None], -np.inf))
    Pqk, M = np.einsum("ic,jc,ijc->ijc", q, k, pairs), np.einsum("ic,jc,ijc->ijc", k, k, pairs)
    X = np.linalg.inv(np.eye(C) + b[:, None] * np.tril(M.sum(axis=-1), -1))
    N = X @ (b[:, None] * (v - (k * np.exp(G)) @ S0))
    dR = b[:, None] * (X.T @ (Pqk.sum(axis=-1).T @ do + (k * np.exp(G[-1] - G)) @ dS))
    Z = np.tril(do @ N.T, -1)[..., None] * Pqk - np.tril(dR @ N.T, -1)[..., None] * M
    rho = np.exp(G) * (q * (do @ S0.T) - k * (dR @ S0.T))
    omega = np.exp(G[-1] - G) * k * (N @ dS.T)
    carried = np.exp(G[-1]) * np.sum(S0 * dS, axis=1)
    dg = np.array(
        [Z[t:, :t].sum((0, 1)) + rho[t:].sum(0) + omega[:t].sum(0) + carried for t in range(C)]
    )
    problem = operator_problem(*args, **kw, scale=None, qk_l2norm=False, out=None)
    exact = recurrent_delta_rule_bwd(problem, do[None, :, None], dS[None, None])[4][0, :, 0]
    dg = dg if gate == "channel" else dg.sum(axis=-1)
    assert np.max(np.abs(dg - exact) / np.abs(exact).max(axis=0)) < 1e-12


def test_equation_21_the_norm():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, K)) * 1e-3
    r = (x @ x + 1e-6) ** -0.5
    step = 1e-9
    numeric = [
        dy @ ((x + h) / np.sqrt((x + h) @ (x + h) + 1e-6) - x * r) / step for h in step * np.eye(K)
    ]
    assert np.allclose(r * (dy - r * x * (r * x @ dy)), numeric, rtol=1e-4, atol=1e-6)


def test_equations_22_and_23_the_core(chunk):
    b, R, M, X = chunk["b"], chunk["R"], chunk["M"], chunk["X"]
    core = -M @ X
    assert deviation(np.triu(core), np.zeros((C, C))) < EXACT
    assert deviation(np.eye(C) + b * core, X) < EXACT
    assert deviation(R + core @ (b * R), R - M @ chunk["N"]) < EXACT
    dN = np.random.default_rng(2).standard_normal((C, V))
    assert deviation(dN + core.T @ (b * dN), X.T @ dN) < EXACT


def test_every_numbered_equation_has_its_test():
    page = Path(__file__).resolve().parents[2] / "docs" / "derivation.md"
    numbers = re.findall(r"\\tag\{(\d+)\}", page.read_text())
    covered = set()
    for first, last in re.findall(
        r"def test_equations?_(\d+)(?:_(?:to|and)_(\d+))?", Path(__file__).read_text()
    ):
        covered |= set(range(int(first), int(last or first) + 1))
    assert [int(n) for n in numbers] == list(range(1, len(numbers) + 1))
    assert {int(n) for n in numbers} - {1} == covered
