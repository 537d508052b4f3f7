"""What a gate does inside a chunk.

With G the inclusive cumulative sum of g over the chunk's tokens, the product of tokens i >= j
gains exp(G_i - G_j), a read of the chunk's entering state exp(G_i), a write to its leaving state
exp(G_C - G_j), and the state itself exp(G_C). Only such differences are ever exponentiated: they
are at most 0, whereas exp(-G_j) overflows.

Arrays are stacks (h, G, n, C, ...): key heads, value heads per key head, chunks, tokens.

The gradient of g_t sums the terms whose factor holds g_t, and no others: pairs with i >= t > j,
reads with i >= t, writes with j < t, the state always. Each of them carries exp(g_t) itself, so a
small gradient is never the difference of large sums, and that of g_t = -inf is exactly 0.
"""

from __future__ import annotations

import numpy as np

LOWEST = -1000.0


def make_decay(gate: str | None, g, dtype) -> Decay:
    """Return the decay for g of shape (h, G, n, C) or (h, G, n, C, K), or for no gate."""
    if gate is None:
        return NoDecay()
    # Long sums of large numbers whose small differences matter: float64 whatever the inputs. The
    # exponential of LOWEST is 0, like that of anything below: -inf too, of which no difference is.
    G = np.cumsum(np.maximum(g, LOWEST), axis=3, dtype=np.float64)
    return ScalarDecay(G, dtype) if gate == "scalar" else ChannelDecay(G, dtype)


def transpose(x):
    return x.swapaxes(-1, -2)


def sum_from(x):
    """sum_{i >= t} x_i for every token t of rows (..., C, K): a product, faster than cumsum."""
    return np.tri(x.shape[-2], dtype=x.dtype).T @ x


def sum_before(x):
    """sum_{j < t} x_j for every token t of rows (..., C, K)."""
    return np.tri(x.shape[-2], k=-1, dtype=x.dtype) @ x


class NoDecay:
    """No gate: every factor is 1."""

    def read(self, x):
        """x_i exp(G_i): rows that meet the entering state."""
        return x

    def write(self, x):
        """x_j exp(G_C - G_j): rows written to the leaving state."""
        return x

    def carry(self, state, chunk: int):
        """exp(G_C) S: the entering state where the chunk ends."""
        return state

    def pairs(self, a, b):
        """P_ij = sum over channels of a_i exp(G_i - G_j) b_j, for i >= j; else 0."""
        return lower_triangle(a @ transpose(b))

    def pairs_gradients(self, dP, a, b, P):
        """Gradients of a, b and g through P = pairs(a, b), from a lower triangular dP."""
        return dP @ b, transpose(dP) @ a, None


class ScalarDecay:
    """One gate per token and head."""

    def __init__(self, G, dtype):
        ends = G[..., -1:]
        later = np.tri(G.shape[-1], dtype=bool)
        difference = np.where(later, G[..., :, None] - G[..., None, :], -np.inf)
        self._pair = np.exp(difference).astype(dtype)
        self._read = np.exp(G)[..., None].astype(dtype)
        self._write = np.exp(ends - G)[..., None].astype(dtype)
        self._carry = np.exp(ends)[..., None].astype(dtype)

    def read(self, x):
        return x * self._read

    def write(self, x):
        return x * self._write

    def carry(self, state, chunk: int):
        return state * self._carry[:, :, chunk]

    def pairs(self, a, b):
        return lower_triangle((a @ transpose(b)) * self._pair)

    def pairs_gradients(self, dP, a, b, P):
        before = transpose(sum_before(transpose(dP * P)))
        dg = np.sum(lower_triangle(before), axis=-2)[..., None]
        decayed = dP * self._pair
        return decayed @ b, transpose(decayed) @ a, dg

    def per_gate(self, x):
        """Sum what concerns one gate over the channels, which stay as an axis of length 1."""
        return np.sum(x, axis=-1, keepdims=True)


class ChannelDecay:
    """One gate per token, head and key channel.

    exp(G_i - G_j) no longer leaves the sum over channels. The chunk is halved again and again:
    between the later half and the earlier one, with m the earlier half's last token, it is
    exp(G_i - G_m) exp(G_m - G_j), two factors of at most 1, so each level is a matrix product per
    pair of halves. Rows of zeros make the tokens a power of two.
    """

    def __init__(self, G, dtype):
        ends = G[..., -1:, :]
        self._read = np.exp(G).astype(dtype)
        self._write = np.exp(ends - G).astype(dtype)
        self._carry = transpose(np.exp(ends)).astype(dtype)
        C = G.shape[-2]
        self._size = 1 << (C - 1).bit_length()
        G = np.concatenate([G, np.repeat(ends, self._size - C, axis=-2)], axis=-2)
        self._levels = []
        half = 1
        while half < self._size:
            early, late = halves(G, half)
            middle = early[..., -1:, :]
            after, before = np.exp(late - middle), np.exp(middle - early)
            self._levels.append((half, after.astype(dtype), before.astype(dtype)))
            half *= 2

    def read(self, x):
        return x * self._read

    def write(self, x):
        return x * self._write

    def carry(self, state, chunk: int):
        return state * self._carry[:, :, chunk]

    def pairs(self, a, b):
        C = a.shape[-2]
        a, b = self._padded(a), self._padded(b)
        diagonal = np.sum(a * b, axis=-1)
        shape = np.broadcast_shapes(diagonal.shape[:-1], self._read.shape[:-2])
        P = np.zeros((*shape, self._size, self._size), a.dtype)
        np.einsum("...ii->...i", P)[...] = diagonal
        for half, after, before in self._levels:
            rows, columns = halves(a, half)[1] * after, halves(b, half)[0] * before
            below_diagonal(P, half)[...] = rows @ transpose(columns)
        return P[..., :C, :C]

    def pairs_gradients(self, dP, a, b, P):
        C = a.shape[-2]
        a, b = self._padded(a), self._padded(b)
        dP = self._padded(transpose(self._padded(transpose(dP))))
        diagonal = np.einsum("...ii->...i", dP)[..., None]
        da, db = diagonal * b, diagonal * a
        dg = np.zeros_like(da)
        for half, after, before in self._levels:
            square = below_diagonal(dP, half)
            late_a, early_b = halves(a, half)[1], halves(b, half)[0]
            rows = after * (square @ (early_b * before))
            columns = before * (transpose(square) @ (late_a * after))
            halves(da, half)[1][...] += rows
            halves(db, half)[0][...] += columns
            early_dg, late_dg = halves(dg, half)
            late_dg += sum_from(late_a * rows)
            early_dg += sum_before(early_b * columns)
        return da[..., :C, :], db[..., :C, :], dg[..., :C, :]

    def _padded(self, x):
        """Rows of zeros after the last token, up to a power of two."""
        missing = self._size - x.shape[-2]
        zeros = np.zeros((*x.shape[:-2], missing, x.shape[-1]), x.dtype)
        return np.concatenate([x, zeros], axis=-2) if missing else x

    def per_gate(self, x):
        return x


def halves(x, half: int):
    """Views of rows (..., C, K), runs of `half` tokens: the earlier and the later of every two."""
    x = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def below_diagonal(P, half: int):
    """A view of (..., C, C): the squares where later halves meet the earlier ones before them."""
    C = P.shape[-1]
    runs = P.reshape(*P.shape[:-2], C // (2 * half), 2, half, C // (2 * half), 2, half)
    return np.einsum("...iaib->...iab", runs[..., 1, :, :, 0, :])


Decay = NoDecay | ScalarDecay | ChannelDecay


def lower_triangle(x, diagonal: int = 0):
    """Clear what lies above the diagonal of matrices, in place, NaN included."""
    np.copyto(x, 0, where=~np.tri(x.shape[-1], k=diagonal, dtype=bool))
    return x
