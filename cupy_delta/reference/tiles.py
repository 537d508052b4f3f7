"""Between the API's layouts and the stacks that the chunk algebra works on.

A `Span` is a run of whole chunks of one sequence for some heads. Its arrays are stacks
(h, G, n, C, ...): key heads, value heads per key head (1 for q and k), chunks, tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..call import Call
from ..problem import Problem

DEFAULT_CHUNK = 64
# Small enough for a block to stay in a core's cache, large enough for calls to be few.
CHUNKS_PER_BLOCK = 4
HEADS_PER_ITEM = 4
L2NORM_EPS = 1e-6


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of batch row b, in chunks of `chunk`; key heads [first, last)."""

    b: int
    start: int
    stop: int
    chunk: int
    first: int
    last: int
    groups: int

    @property
    def stack(self) -> tuple[int, int]:
        """(n, C)."""
        return (self.stop - self.start) // self.chunk, self.chunk

    def key_heads(self, x, dtype):
        """Load (B, T, H, ...) as (h, 1, n, C, ...)."""
        x = x[self.b, self.start : self.stop, self.first : self.last]
        x = np.ascontiguousarray(x.swapaxes(0, 1), dtype)
        return x.reshape(self.last - self.first, 1, *self.stack, *x.shape[2:])

    def value_heads(self, x, dtype):
        """Load (B, T, HV, ...) as (h, G, n, C, ...)."""
        x = x[self.b, self.start : self.stop, self.value_slice]
        x = np.ascontiguousarray(x.swapaxes(0, 1), dtype)
        return x.reshape(self.last - self.first, self.groups, *self.stack, *x.shape[2:])

    def parameters(self, x, dtype):
        """Load (HV, ...), the same for all tokens, as (h, G, 1, 1, ...)."""
        x = np.asarray(x[self.value_slice], dtype)
        return x.reshape(self.last - self.first, self.groups, 1, 1, *x.shape[1:])

    def store_key_heads(self, out, x) -> None:
        """Store (h, n, C, ...) into (B, T, H, ...)."""
        tokens = self.stop - self.start
        x = x.reshape(self.last - self.first, tokens, *x.shape[3:])
        out[self.b, self.start : self.stop, self.first : self.last] = x.swapaxes(0, 1)

    def store_value_heads(self, out, x) -> None:
        """Store (h, G, n, C, ...) into (B, T, HV, ...)."""
        tokens = self.stop - self.start
        x = x.reshape((self.last - self.first) * self.groups, tokens, *x.shape[4:])
        out[self.b, self.start : self.stop, self.value_slice] = x.swapaxes(0, 1)

    @property
    def value_slice(self) -> slice:
        return slice(self.first * self.groups, self.last * self.groups)


@dataclass(frozen=True)
class Item:
    """One sequence for some heads: what a thread walks over, block after block.

    `index` numbers the sequence, `first_block` its first block among all sequences' blocks and
    `first_slot` its first chunk on the chunk axis.
    """

    index: int
    first_block: int
    first_slot: int
    spans: tuple[Span, ...]
    heads: slice
    groups: int

    def states(self, x, dtype, index: int | None = None):
        """Load (N, HV, ., .) states as (h, G, ., .), those of the sequence or of another place."""
        index = self.index if index is None else index
        x = np.array(x[index, self.heads], dtype, order="C")
        return x.reshape(-1, self.groups, *x.shape[1:])


def items(problem: Problem, chunk: int) -> Iterator[Item]:
    """Yield the independent items of a problem; they do not depend on the number of threads."""
    G = problem.groups
    step = max(1, HEADS_PER_ITEM // G)
    block = 0
    for b, start, stop, n in problem.sequences():
        runs = _runs(start, stop, chunk)
        slot = 0 if problem.cu_seqlens is None else start // chunk + n
        for first in range(0, problem.H, step):
            last = min(first + step, problem.H)
            spans = tuple(Span(b, t0, t1, c, first, last, G) for t0, t1, c in runs)
            yield Item(n, block, slot, spans, slice(first * G, last * G), G)
        block += len(runs)


def block_count(problem: Problem, chunk: int) -> int:
    """Blocks of all sequences together."""
    return sum(len(_runs(start, stop, chunk)) for _, start, stop, _ in problem.sequences())


def most_blocks(call: Call, chunk: int) -> int:
    """Bound `block_count` by what is known without a value; without cu_seqlens it is the same."""
    if call.varlen:
        return call.T // (chunk * CHUNKS_PER_BLOCK) + 2 * call.N
    return call.B * len(_runs(0, call.T, chunk))


def _runs(start: int, stop: int, chunk: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into blocks of whole chunks and one short last chunk."""
    whole = stop - (stop - start) % chunk
    step = chunk * CHUNKS_PER_BLOCK
    runs = [(t, min(t + step, whole), chunk) for t in range(start, whole, step)]
    if whole < stop:
        runs.append((whole, stop, stop - whole))
    return runs


def l2norm(x):
    """Return (y, r, unit) with y = r unit x and r unit = rsqrt(sum(x^2) + eps).

    The unit of a row is 1, or a power of two where its squares overflow: the eps is nothing there.
    """
    squares = np.sum(x * x, axis=-1, keepdims=True)
    unit, large = np.ones_like(squares), np.isinf(squares)
    if large.any():
        _, exponent = np.frexp(np.max(np.abs(x), axis=-1, keepdims=True))
        unit[large] = np.ldexp(unit, -exponent)[large]
        squares = np.where(large, np.sum(np.square(x * unit), axis=-1, keepdims=True), squares)
    r = 1 / np.sqrt(squares + L2NORM_EPS * np.square(unit))
    return x * unit * r, r, unit


def l2norm_gradient(dy, y, r, unit):
    """dx = r unit (dy - y (y . dy)), exact with the eps."""
    return r * (dy - y * np.sum(y * dy, axis=-1, keepdims=True)) * unit
