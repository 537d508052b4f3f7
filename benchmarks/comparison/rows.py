"""What is measured: the shapes, the arrays drawn for them, and the floor under each time.

The floor is a count of what no chunkwise evaluation can leave out, divided by two rates measured
on an H200. Chunks of 64; the form with the fewest products (V - K S is formed first, so U and W
never are); every triangle skipped; products that the value heads of a group share are made once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import accumulate
from typing import Any

import numpy as np

FLOP_PER_SECOND = 790e12
"""Assumption: a large bfloat16 matrix product on an H200."""
BYTES_PER_SECOND = 4.3e12
"""Assumption: a device-to-device copy on an H200, read and written bytes together."""
FLOOR_CHUNK = 64
BYTES = 2  # of one bfloat16
MEAN_DECAY = 0.1
"""Of the logarithms of gates, where a row says nothing else."""

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Row:
    """One shape: H heads of q and k, HV of v, beta and o; which group it belongs to.

    `lengths` holds one length per sequence. A `ragged` row packs them end to end with cu_seqlens.
    Where `decay` is not 0 there is a log decay per token and value head, exponentially distributed
    with this mean. A row that is `per_channel` has one per key channel instead, of -5 u^4 with
    uniform u. beta is uniform between 0 and `largest_beta`.
    """

    group: str
    lengths: tuple[int, ...]
    H: int
    HV: int
    K: int = 128
    V: int = 128
    ragged: bool = False
    decay: float = 0.0
    largest_beta: float = 1.0
    per_channel: bool = False

    @property
    def gated(self) -> bool:
        return self.decay != 0 or self.per_channel

    @property
    def gates(self) -> int:
        """Gates per token and value head."""
        return self.K if self.per_channel else int(self.gated)

    @property
    def name(self) -> str:
        tokens = f"{len(self.lengths)}x{self.lengths[0]}"
        if self.ragged:
            parts = "+".join(str(x) for x in self.lengths)
            few = len(self.lengths) <= 2
            tokens = parts if few else f"{len(self.lengths)} ragged, {self.tokens}"
        parts = [tokens, f"h{self.H}/{self.HV}"]
        if self.K != self.V:
            parts.append(f"k{self.K} v{self.V}")
        elif self.K != 128:
            parts.append(f"d{self.K}")
        if self.per_channel:
            parts.append("per channel")
        elif self.gated:
            parts.append("gated" if self.decay == MEAN_DECAY else f"gated {self.decay:g}")
        if self.largest_beta != 1:
            parts.append(f"beta {self.largest_beta:g}")
        return " ".join(parts)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def batch(self) -> tuple[int, int]:
        """B and T of the arrays."""
        return (1, self.tokens) if self.ragged else (len(self.lengths), self.lengths[0])

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k, v, beta and g."""
        columns = 4 * (1 + self.gates)
        return self.tokens * (2 * self.H * self.K * BYTES + self.HV * (self.V * BYTES + columns))

    def shortened(self) -> Row:
        """The same heads and width with at most 512 tokens, for the float64 check."""
        lengths = (100, 37, 256, 119) if self.ragged else (500,)
        return replace(self, lengths=lengths)


def tiny(row: Row) -> Row:
    """128 tokens of a row's heads.

    What every contestant is tried on, and what the host's time per call is taken with: heads of its
    own would have everything compiled and tuned once more.
    """
    return replace(row, group="tiny", lengths=(128,), ragged=False)


def _rows() -> tuple[Row, ...]:
    def several(group, *shapes, D=128, **options):
        return [Row(group, (T,) * B, H, HV, D, D, **options) for B, T, H, HV in shapes]

    def gated(*shapes, group="gated", decay=MEAN_DECAY, **options):
        return several(group, *shapes, decay=decay, **options)

    tail = (12345, 77, 8191, 1, 513, 4096, 6001, 1544)
    wide = Row("gated_more", (8192,) * 4, 30, 30, 96, 192, decay=MEAN_DECAY, largest_beta=2.0)
    strong = (8, 1024, 16, 64), (1, 32768, 16, 64), (1, 32768, 8, 32), (1, 8192, 2, 8)
    return (
        *several("gva", *((1, 32768, *heads) for heads in ((2, 8), (4, 16), (8, 32), (16, 64)))),
        *several("gva", (4, 8192, 16, 64), (1, 8192, 2, 8), (1, 8192, 8, 32), (1, 8192, 16, 64)),
        *several("gva", (8, 1024, 16, 64), (8, 1024, 4, 16), (1, 2048, 2, 8)),
        *several("grouped", *((1, 32768, *heads) for heads in ((16, 32), (4, 8), (2, 4)))),
        *several("grouped", (8, 4096, 16, 32), (1, 8192, 16, 32), (1, 8192, 4, 8)),
        *several("equal", *((1, 32768, H, H) for H in (8, 16, 32)), (4, 8192, 32, 32)),
        *several("equal", (8, 1024, 16, 16), (1, 8192, 8, 8), (1, 2048, 8, 8)),
        Row("ragged", (28672, 4096), 16, 64, ragged=True),
        Row("ragged", tail, 16, 64, ragged=True),
        Row("ragged", tail, 16, 32, ragged=True),
        *several("width", (1, 32768, 32, 32), (4, 8192, 32, 32), D=64),
        *several("width", (1, 32768, 16, 16), (4, 8192, 16, 16), D=256),
        *several("length", *((1, T, 16, 16) for T in (512, 2048, 8192, 131072))),
        *several("gva", (1, 32768, 8, 24), (1, 32768, 16, 48), (2, 16384, 16, 64)),
        *several("gva", (4, 8192, 8, 32), (8, 4096, 4, 16)),
        *gated((4, 8192, 16, 64), (1, 32768, 16, 64), (8, 4096, 16, 32), (8, 1024, 16, 64)),
        *gated((1, 8192, 16, 64), (1, 32768, 8, 32), (1, 32768, 2, 8), (1, 8192, 2, 8)),
        *gated((4, 8192, 32, 32), (1, 32768, 16, 32)),
        *gated((1, 32768, 32, 32), D=64, group="gated_more"),
        wide,
        replace(wide, lengths=(32768,)),
        Row("gated_more", tail, 16, 64, ragged=True, decay=MEAN_DECAY),
        *(gated((4, 8192, 16, 64), group="gated_more", decay=x)[0] for x in (1.0, 2.0, 5.0)),
        *gated(*strong, group="gated_strong", decay=1.0),
        *gated(*strong, group="gated_strong", decay=5.0),
        *several("channel", *((1, T, 32, 32) for T in (8192, 32768)), per_channel=True),
        *several("channel", (4, 8192, 32, 32), (1, 32768, 8, 8), per_channel=True),
        *several("channel", (1, 8192, 96, 96), per_channel=True),
    )


ROWS = _rows()


def chosen(patterns: list[str]) -> list[Row]:
    """Rows whose group or name matches one of the patterns (* and ? as in file names)."""
    found = [r for r in ROWS if any(fnmatch(r.name, p) or r.group == p for p in patterns)]
    return found if patterns else list(ROWS)


def flops(row: Row, passes: str, chunk: int = FLOOR_CHUNK) -> float:
    """Floating point operations of the whole row."""
    K, V, G = row.K, row.V, row.HV / row.H
    if passes == "forward":
        # K S, Q S, K^T N; triangles of K K^T and Q K^T (shared), of T R and P N; the inverse.
        each = 6 * K * V + 2 * chunk * K / G + 2 * (chunk + 1) * V + chunk**2 / 3
    else:
        # Seven products with a state. Of the chunk's products five of ten triangles are sums over
        # the group or products of q and k alone; the other five have columns of values.
        each = 14 * K * V + 5 * chunk * K / G + 5 * chunk * V
    return each * row.tokens * row.HV


def traffic(row: Row, passes: str, states: int = 1) -> float:
    """Bytes: every input read once, every output written once; `states` float32 ones per head."""
    K, V, G = row.K, row.V, row.HV / row.H
    columns = 1 + row.gates
    if passes == "forward":  # q, k | v, o | beta, g
        each = 2 * K * BYTES / G + 2 * V * BYTES + 4 * columns
        ends = states * len(row.lengths) * row.HV * K * V * 4
    else:  # q, k, dq, dk | v, do, dv | beta, dbeta, g, dg
        each, ends = 4 * K * BYTES / G + 3 * V * BYTES + 8 * columns, 0
    return each * row.tokens * row.HV + ends


def floor_ms(row: Row, passes: str) -> float:
    """Milliseconds below which no chunkwise evaluation can be, at the two assumed rates."""
    seconds = (flops(row, passes) / FLOP_PER_SECOND, traffic(row, passes) / BYTES_PER_SECOND)
    return max(seconds) * 1e3


def copies_past_cache(row: Row, cache_bytes: int) -> int:
    """Copies of the inputs that together are three times as large as the cache."""
    return max(1, -(-3 * cache_bytes // row.input_bytes))


@dataclass(frozen=True)
class Inputs:
    """The arrays of a row, NumPy's or CuPy's: bfloat16, beta and g float32, keys of unit length."""

    row: Row
    q: Any
    k: Any
    v: Any
    beta: Any
    do: Any
    cu_seqlens: Any
    g: Any = None

    def wide(self) -> Inputs:
        """The same values in float64; NumPy arrays only."""
        wide = (x.astype(np.float64) for x in (self.q, self.k, self.v, self.beta, self.do))
        g = None if self.g is None else self.g.astype(np.float64)
        return Inputs(self.row, *wide, self.cu_seqlens, g)


def draw(row: Row, xp, seed: int = 0, dtype: str = "bfloat16") -> Inputs:
    """Draw the arrays of a row with the array library `xp`."""
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    rng = xp.random.default_rng(seed)
    B, T = row.batch

    def normal(heads: int, size: int, unit: bool):
        x = rng.standard_normal((B, T, heads, size), xp.float32)
        if unit:
            x /= xp.sqrt((x * x).sum(-1, keepdims=True))
        return x.astype(dtype)

    q, k = normal(row.H, row.K, True), normal(row.H, row.K, True)
    v, do = normal(row.HV, row.V, False), normal(row.HV, row.V, False)
    beta = rng.random((B, T, row.HV), xp.float32) * xp.float32(row.largest_beta)
    ends = xp.asarray([0, *accumulate(row.lengths)], xp.int64) if row.ragged else None
    g = None
    if row.per_channel:
        g = rng.random((B, T, row.HV, row.K), xp.float32)
        g = g * g * g * g * xp.float32(-5)
    elif row.gated:
        g = rng.standard_exponential((B, T, row.HV), xp.float32) * xp.float32(-row.decay)
    return Inputs(row, q, k, v, beta, do, ends, g)
