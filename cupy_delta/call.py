"""Call: one call without its arrays, described once. What plans depend on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .arrays import FLOAT_DTYPES
from .raw import RawBeta, RawGate
from .typing import StateLayout

Gate = Literal["scalar", "channel"]
_FLOAT32, _FLOAT64 = FLOAT_DTYPES["float32"], FLOAT_DTYPES["float64"]
POOL_ALIGNMENT = 16  # bytes, of pools that lie as arrays do


@dataclass(frozen=True, kw_only=True)
class Call:
    """Sizes, dtypes and options of a call; hashable, and equal to any call that is alike.

    `dtype` is that of q, k and v. `gate` is that of g: None, "scalar" (B, T, HV) or "channel"
    (B, T, HV, K), with `narrow_gate` of 16 bits as `dtype`; with `beta_per_value`, beta is
    (B, T, HV, V). `raw_gate` and `raw_beta` tell how these are formed where parameters were given
    in their place. With `varlen`, N sequences lie end to end along T, and B = 1. `chunks` is the
    length of the chunk axis of states that were given.
    A pool has `pool_slots` states of `pool_dtype`, `pool_stride` elements from one to the next, at
    addresses that are multiples of `pool_alignment` bytes; without a pool `pool_dtype` is None.
    `accepting`: the states of a step take up only the tokens that are accepted. `kept` holds what
    was derived from all this, plans for example.
    """

    dtype: np.dtype
    B: int = 0
    T: int = 0
    N: int = 0
    H: int = 0
    HV: int = 0
    K: int = 0
    V: int = 0
    gate: Gate | None = None
    narrow_gate: bool = False
    beta_per_value: bool = False
    raw_gate: RawGate | None = None
    raw_beta: RawBeta | None = None
    varlen: bool = False
    chunks: int | None = None
    pool_slots: int = 0
    pool_dtype: np.dtype | None = None
    pool_stride: int = 0
    pool_alignment: int = POOL_ALIGNMENT
    checkpoint_every: int | None = None
    accepting: bool = False
    scale: float = 1.0
    qk_l2norm: bool = False
    chunk_size: int | None = None
    state_layout: StateLayout = "kv"
    kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def groups(self) -> int:
        """Value heads per key head."""
        return self.HV // self.H

    @property
    def key_shape(self) -> tuple[int, ...]:
        """The shape of q and k."""
        return (self.B, self.T, self.H, self.K)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of v and o."""
        return (self.B, self.T, self.HV, self.V)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of what every token and value head has one of, as beta."""
        return (self.B, self.T, self.HV)

    @property
    def gate_shape(self) -> tuple[int, ...]:
        """The shape of g, of a call that has one."""
        return (*self.token_shape, self.K) if self.gate == "channel" else self.token_shape

    @property
    def compute_dtype(self) -> np.dtype:
        """What the arithmetic runs in."""
        return _FLOAT64 if self.dtype == _FLOAT64 else _FLOAT32

    # The dtype of states that are arguments or results.
    state_dtype = compute_dtype

    @property
    def state_symbols(self) -> str:
        return "N HV K V" if self.state_layout == "kv" else "N HV V K"

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, symbol) for symbol in self.state_symbols.split())

    def chunk_slots(self, chunk: int) -> int:
        """Return the length of the chunk axis of chunked arrays.

        Chunk i of sequence n has slot ``cu_seqlens[n] // C + n + i``, a number that needs no
        other sequence's length; without `cu_seqlens` every batch row has its own ceil(T / C).
        """
        return self.T // chunk + self.N if self.varlen else -(-self.T // chunk)

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """The shape of the states after every `checkpoint_every` tokens.

        That after (i + 1) E tokens of sequence n has place ``cu_seqlens[n] // E + i``, for no two
        sequences the same one; without `cu_seqlens` every batch row has T // E of its own.
        """
        assert self.checkpoint_every is not None
        return (self.B, self.T // self.checkpoint_every, *self.state_shape[1:])

    def states_shape(self, chunk: int) -> tuple[int, ...]:
        """Return the shape of states entering chunks."""
        return (self.B, self.chunk_slots(chunk), self.HV, self.K, self.V)
