"""A plain chunkwise evaluation with operands rounded to a dtype: what kernels are judged by."""

from itertools import pairwise

import numpy as np


class Rounded:
    """Products of one value head of one sequence, operands rounded to a dtype, chunk after chunk.

    float32 sums and everything else in float64, the inverse exact. Letters of docs/derivation.md;
    e, w and carry are the decays of reads, of writes and of the state.
    """

    def __init__(self, dtype, q, k, v, beta, g, scale, chunk):
        self.dtype, self.scale = dtype, scale
        self.inputs, self.chunk = (q, k, v, beta, g), chunk

    def mul(self, a, b):
        a, b = (x.astype(self.dtype).astype(np.float64) for x in (a, b))
        return a @ b

    def forward(self, S):
        """Return (o, state after the last chunk) and keep what `backward` reads."""
        self.kept, o = [], np.zeros(self.inputs[2].shape)
        for first in range(0, len(o), self.chunk):
            rows = slice(first, min(first + self.chunk, len(o)))
            Q, K, V, b, g = (x[rows] for x in self.inputs)
            G, b = np.cumsum(g), b[:, None]
            e, w, carry = np.exp(G)[:, None], np.exp(G[-1] - G)[:, None], np.exp(G[-1])
            D = np.exp(np.where(np.tri(len(K)) > 0, G[:, None] - G[None], -np.inf))
            M, P = np.tril(self.mul(K, K.T) * D, -1), self.scale * self.mul(Q, K.T) * D
            core = -M @ np.linalg.inv(np.eye(len(K)) + b * M)
            R = V - e * self.mul(K, S)
            N_hat = R + self.mul(core, b * R)
            N = b * N_hat
            self.kept.append((rows, Q, K, b, e, w, carry, D, M, P, core, N_hat, N, S))
            o[rows] = self.scale * (e * self.mul(Q, S) + self.mul(P / self.scale, N))
            S = carry * S + self.mul(K.T, w * N)
        return o, S

    def backward(self, do, dS):
        """Return the gradients of q, k, v, beta, g and the state that entered."""
        s, mul = self.scale, self.mul
        dq, dk, dv, dbeta, dg = (np.zeros(x.shape) for x in self.inputs)
        for rows, Q, K, b, e, w, carry, D, M, P, core, N_hat, N, S in reversed(self.kept):
            dO = do[rows]
            dN = s * mul(P.T / s, dO) + w * mul(K, dS)
            Y = dN + mul(core.T, b * dN)
            dR = b * Y
            dP, E = mul(dO, N.T) * D, -np.tril(mul(dR, N.T) * D, -1)
            from_q, from_k, into_k = e * mul(dO, S.T), e * mul(dR, S.T), w * mul(N, dS.T)
            dq[rows] = s * (from_q + mul(dP, K))
            dk[rows] = s * mul(dP.T, Q) + into_k - from_k + mul(E + E.T, K)
            dv[rows], dbeta[rows] = dR, np.sum(Y * N_hat, 1)
            # Sums of what holds the gate, for pairs of the values without decays of a second time.
            Z = np.tril(mul(dO, N.T) * P - mul(dR, N.T) * M, -1)
            reads, writes = np.sum(s * Q * from_q - K * from_k, 1), np.sum(K * into_k, 1)
            state = carry * np.sum(S.astype(self.dtype) * dS.astype(self.dtype), dtype=np.float64)
            dg[rows] = [
                np.sum(Z[t:, :t]) + np.sum(reads[t:]) + np.sum(writes[:t]) + state
                for t in range(len(K))
            ]
            dS = carry * dS + s * mul(Q.T, e * dO) - mul(K.T, e * dR)
        return dq, dk, dv, dbeta, dg, dS


class RoundedChannels(Rounded):
    """The same with a gate per key channel, whose decays are in the rows that meet a state.

    Pairs of tokens are not products of two matrices: they are exact, but for what else is rounded.
    """

    def forward(self, S):
        self.kept, o = [], np.zeros(self.inputs[2].shape)
        for first in range(0, len(o), self.chunk):
            rows = slice(first, min(first + self.chunk, len(o)))
            Q, K, V, b, g = (x[rows] for x in self.inputs)
            G, b = np.cumsum(g, axis=0), b[:, None]
            e, w, carry = np.exp(G), np.exp(G[-1] - G), np.exp(G[-1])[:, None]
            lower = np.tri(len(K), dtype=bool)[..., None]
            D = np.exp(np.where(lower, G[:, None] - G[None], -np.inf))
            M = np.tril(np.einsum("ic,jc,ijc->ij", K, K, D), -1)
            P = np.einsum("ic,jc,ijc->ij", Q, K, D)
            core = -M @ np.linalg.inv(np.eye(len(K)) + b * M)
            R = V - self.mul(e * K, S)
            N_hat = R + self.mul(core, b * R)
            N = b * N_hat
            self.kept.append((rows, Q, K, b, e, w, carry, D, P, core, N_hat, N, S))
            o[rows] = self.scale * (self.mul(e * Q, S) + self.mul(P, N))
            S = carry * S + self.mul((w * K).T, N)
        return o, S

    def backward(self, do, dS):
        s, mul = self.scale, self.mul
        dq, dk, dv, dbeta, dg = (np.zeros(x.shape) for x in self.inputs)
        for rows, Q, K, b, e, w, carry, D, P, core, N_hat, N, S in reversed(self.kept):
            dO = do[rows]
            dN = s * mul(P.T, dO) + mul(w * K, dS)
            Y = dN + mul(core.T, b * dN)
            dR = b * Y
            dP = s * np.tril(mul(dO, N.T))[..., None] * D
            E = -np.tril(mul(dR, N.T), -1)[..., None] * D
            from_q, from_k, into_k = s * e * mul(dO, S.T), -e * mul(dR, S.T), w * mul(N, dS.T)
            dq[rows] = from_q + np.einsum("ijc,jc->ic", dP, K)
            dk[rows] = from_k + into_k + np.einsum("ijc,jc->ic", E, K)
            dk[rows] += np.einsum("ijc,ic->jc", dP, Q) + np.einsum("ijc,ic->jc", E, K)
            dv[rows], dbeta[rows] = dR, np.sum(Y * N_hat, 1)
            Z = (dP * Q[:, None] + E * K[:, None]) * K
            reads, writes = Q * from_q + K * from_k, K * into_k
            state = carry[:, 0] * np.sum(S * dS, axis=1)
            dg[rows] = [
                Z[t:, :t].sum((0, 1)) + reads[t:].sum(0) + writes[:t].sum(0) + state
                for t in range(len(K))
            ]
            dS = carry * dS + s * mul((e * Q).T, dO) - mul((e * K).T, dR)
        return dq, dk, dv, dbeta, dg, dS


def heads(args, kw, chunk):
    """Yield (span, head, value head, sequence, `Rounded`, entering state) of a call."""
    dtype = args[0].dtype
    q, k, v, beta = (np.asarray(x, np.float64) for x in args[:4])
    g = np.zeros(beta.shape) if args[4] is None else np.asarray(args[4], np.float64)
    g, products = np.maximum(g, -1000), RoundedChannels if g.ndim == 4 else Rounded
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    cu = kw["cu_seqlens"]
    spans = [(b, slice(0, T)) for b in range(B)]
    if cu is not None:
        spans = [(0, slice(int(a), int(z))) for a, z in pairwise(cu)]
    for n, span in enumerate(spans):
        for hv in range(HV):
            h = hv // (HV // H)
            one = (q[(*span, h)], k[(*span, h)], v[(*span, hv)], beta[(*span, hv)], g[(*span, hv)])
            S = np.zeros((K, V))
            if kw["initial_state"] is not None:
                S = _turned(kw, kw["initial_state"])[n, hv]
            yield span, h, hv, n, products(dtype, *one, kw.get("scale") or K**-0.5, chunk), S


def _turned(kw, states):
    states = np.asarray(states, np.float64)
    return states if kw["state_layout"] == "kv" else states.swapaxes(-1, -2)


def rounded_products(args, kw, chunk):
    """Return (o, final_state) from products of operands rounded to the inputs' dtype.

    Outputs are rounded once.
    """
    v = args[2]
    N = v.shape[0] if kw["cu_seqlens"] is None else len(kw["cu_seqlens"]) - 1
    o, final = np.zeros(v.shape), np.zeros((N, v.shape[2], args[0].shape[3], v.shape[3]))
    for span, _, hv, n, products, S in heads(args, kw, chunk):
        o[(*span, hv)], final[n, hv] = products.forward(S)
    return o.astype(v.dtype).astype(np.float64), _turned(kw, final)


def rounded_gradients(args, kw, do, dfinal, chunk):
    """Return the gradients (dq, dk, dv, dbeta, dg, dinitial_state) from such products."""
    dtype, do = args[0].dtype, np.asarray(do, np.float64)
    g = args[3] if args[4] is None else args[4]
    dq, dk, dv, dbeta, dg = (np.zeros(x.shape) for x in (*args[:4], g))
    N = do.shape[0] if kw["cu_seqlens"] is None else len(kw["cu_seqlens"]) - 1
    initial = np.zeros((N, do.shape[2], args[0].shape[3], do.shape[3]))
    for span, h, hv, n, products, S in heads(args, kw, chunk):
        products.forward(S)
        dS = np.zeros(S.shape) if dfinal is None else _turned(kw, dfinal)[n, hv]
        one = products.backward(do[(*span, hv)], dS)
        dq[(*span, h)] += one[0]
        dk[(*span, h)] += one[1]
        dv[(*span, hv)], dbeta[(*span, hv)], dg[(*span, hv)], initial[n, hv] = one[2:]
    dq, dk, dv = (x.astype(dtype).astype(np.float64) for x in (dq, dk, dv))
    return dq, dk, dv, dbeta, dg, _turned(kw, initial)


def error(x, y):
    """Relative error in the Frobenius norm; NaN is infinite."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    value = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
    return np.inf if np.isnan(value) else float(value)


def twice(plain, exact):
    """Return a bound: twice the error of the plain evaluation, which must be finite itself."""
    bound = 2 * error(plain, exact) + 1e-7
    assert np.isfinite(bound)
    return bound


def wide(args, kw):
    """Return the call's arguments in float64."""
    args = [None if x is None else x.astype(np.float64) for x in args]
    initial = kw["initial_state"]
    return args, kw | {"initial_state": None if initial is None else initial.astype(np.float64)}
