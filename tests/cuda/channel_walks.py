"""The walks over chunks with a gate per key channel, with factors given."""

import numpy as np
from channels import chunks

from cupy_delta.cuda.sm90.tiles import CHUNK


def sequences(p):
    """Yield (sequence, slot, batch row, rows) of every chunk."""
    for slot, b, rows in chunks(p):
        n = b
        if p.cu_seqlens is not None:
            n = int(np.searchsorted(p.cu_seqlens, rows.start, side="right")) - 1
        yield n, slot, b, rows


class Walk:
    """The walks with factors given; operands and results, but last states, rounded to a dtype."""

    def __init__(self, p, factors, beta, dtype=None):
        self.p, self.dtype = p, dtype
        self.beta = np.asarray(beta, np.float64)
        self.factors = {name: np.asarray(x, np.float64) for name, x in factors.items()}

    def rounded(self, x):
        return x if self.dtype is None else x.astype(self.dtype).astype(np.float64)

    def mul(self, a, b):
        return self.rounded(a) @ self.rounded(b)

    def chunk(self, slot, b, tokens, hv):
        f, at, n = self.factors, (b, tokens, hv), tokens.stop - tokens.start
        core, pairs = (f[name][at][:, :n] for name in ("core", "p"))
        rows = (f[name][at] for name in ("k_read", "q_read", "k_write"))
        return *rows, core, pairs, f["channel_decays"][slot, hv][:, None], self.beta[at][:, None]

    def forward(self, v, initial):
        """Return o, final_state (K, V), states (V, K) entering chunks, and corrections."""
        p, S, mul = self.p, np.array(initial, np.float64), self.mul
        o, corrections = np.zeros(v.shape), np.zeros(v.shape)
        states = np.zeros((p.B * p.chunk_slots(CHUNK), p.HV, p.V, p.K))
        for n, slot, b, tokens in sequences(p):
            for hv in range(p.HV):
                k, q, write, core, pairs, c, beta = self.chunk(slot, b, tokens, hv)
                states[slot, hv] = S[n, hv].T
                R = v[b, tokens, hv] - mul(k, S[n, hv])
                N = R + mul(core, beta * R)
                corrections[b, tokens, hv] = N
                o[b, tokens, hv] = p.scale * (mul(q, S[n, hv]) + mul(pairs, beta * N))
                S[n, hv] = c * S[n, hv] + mul(write.T, beta * N)
        o, states, corrections = map(self.rounded, (o, states, corrections))
        return o, S, states, corrections

    def backward(self, do, final):
        """Return dy, dinitial_state (K, V) and dstates (V, K) leaving chunks."""
        p, S, mul = self.p, np.array(final, np.float64), self.mul
        dy = np.zeros(do.shape)
        dstates = np.zeros((p.B * p.chunk_slots(CHUNK), p.HV, p.V, p.K))
        for n, slot, b, tokens in reversed(list(sequences(p))):
            for hv in range(p.HV):
                k, q, write, core, pairs, c, beta = self.chunk(slot, b, tokens, hv)
                dO = p.scale * do[b, tokens, hv]
                dstates[slot, hv] = S[n, hv].T
                dN = mul(pairs.T, dO) + mul(write, S[n, hv])
                Y = dN + mul(core.T, beta * dN)
                dy[b, tokens, hv] = Y
                S[n, hv] = c * S[n, hv] + mul(q.T, dO) - mul(k.T, beta * Y)
        return self.rounded(dy), S, self.rounded(dstates)
