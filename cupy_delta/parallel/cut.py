"""Where sequences lie when their tokens are cut into the shares of ranks.

A sequence that begins before a rank's tokens enters the rank, and one that ends after them leaves
it. Without `cu_seqlens` every batch row enters and leaves, in the order of ranks. With it at most
the first sequence of a rank enters, and at most the last leaves. An empty sequence belongs to the
rank of the token before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cut:
    """The share of one rank, and what it has to know of the others.

    Its sequences are `first` to `end` of the whole batch, `cu_seqlens` their tokens on this rank.
    Of these sequences the first `entering` enter and the last `leaving` leave; `lanes` is their
    number where there are any: B, or 1 with `cu_seqlens`. `through` tells for every rank whether
    the same sequences enter and leave it, `begins` and `ends` how many sequences begin and end
    there.
    """

    lanes: int
    first: int
    end: int
    entering: int
    leaving: int
    cu_seqlens: np.ndarray | None
    through: tuple[bool, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def sequences(self) -> int:
        return self.end - self.first

    def entering_tokens(self) -> slice:
        """Return the tokens of the sequences that enter."""
        return slice(None) if self.cu_seqlens is None else slice(0, int(self.cu_seqlens[1]))

    def leaving_tokens(self) -> slice:
        """Return the tokens of the sequences that leave."""
        return slice(None) if self.cu_seqlens is None else slice(int(self.cu_seqlens[-2]), None)


def cut_batch(rank: int, size: int, B: int) -> Cut:
    """Cut batch rows, each of which goes over all ranks."""
    some = B > 0
    through = tuple(some and 0 < r < size - 1 for r in range(size))
    begins, ends = ((*[0] * r, B, *[0] * (size - 1 - r)) for r in (0, size - 1))
    entering, leaving = B * (rank > 0), B * (rank < size - 1)
    return Cut(B, 0, B, entering, leaving, None, through, tuple(begins), tuple(ends))


def cut_sequences(rank: int, tokens: list[int], cu_seqlens: np.ndarray) -> Cut:
    """Cut sequences that lie end to end; `tokens` is how many each rank has."""
    bounds = np.cumsum([0, *tokens])
    starts, stops = cu_seqlens[:-1].astype(np.int64), cu_seqlens[1:].astype(np.int64)
    last = np.where(stops > 0, np.searchsorted(bounds[1:], stops - 1, side="right"), 0)
    first = np.where(stops > starts, np.searchsorted(bounds[1:], starts, side="right"), last)
    ranks = np.arange(len(tokens))
    begins, ends = (np.bincount(x, minlength=len(tokens)) for x in (first, last))
    # The sequences of rank r are all that begin there or before but for those that end before it.
    from_, to = np.searchsorted(last, ranks, "left"), np.searchsorted(first, ranks, "right")
    to = np.maximum(from_, to)
    enters, leaves = (np.zeros(len(tokens), bool) for _ in range(2))
    some = to > from_
    enters[some] = first[from_[some]] < ranks[some]
    leaves[some] = last[to[some] - 1] > ranks[some]
    through = enters & leaves & (to - from_ == 1)
    a, z = int(from_[rank]), int(to[rank])
    own = np.clip(cu_seqlens[a : z + 1], bounds[rank], bounds[rank + 1]) - bounds[rank]
    return Cut(
        1,
        a,
        z,
        int(enters[rank]),
        int(leaves[rank]),
        own.astype(np.int64),
        tuple(map(bool, through)),
        tuple(map(int, begins)),
        tuple(map(int, ends)),
    )
