"""The mathematics: what a rank's tokens do to a state, and to the gradient of one.

A rank's tokens map the state that enters them, S, and back the gradient of the one that leaves, D:

    S -> P S + H                    D -> P^T D + sum_t r_t do_t^T

with r_t^T S what the output of token t has from S: ``r_t = scale (M_t ... M_1)^T q_t`` for the
tokens' maps ``M = (I - beta k k^T) diag(exp(g))``, whose product is P. Both come from the operator
itself: without values and from the identity its outputs are r_t and its final state is P. H is its
final state from zero. Where a sequence begins on the rank, what leaves does not depend on S: then
H is its final state from its initial state, and P is not used. Kernels that compute all this on
their way to the outputs are asked for it instead, see `halves.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..arrays import FLOAT_DTYPES, dtype_name, module_of
from ..dispatch import backend_for
from ..operators import chunk_delta_rule
from ..raw import tokens_of
from ..results import Transfer
from ..workspace import left_aside
from .communicators import Communicator
from .products import outer_sum

GATHERED = 16  # ranks up to which all tell all; beyond, a scan


@dataclass(frozen=True, eq=False)
class Tokens:
    """Consecutive tokens with the options of a call."""

    q: Any
    k: Any
    v: Any
    beta: Any
    g: Any
    scale: float
    qk_l2norm: bool
    chunk_size: int | None

    def part(self, span: slice) -> Tokens:
        """Return some of the tokens."""
        arrays = {name: getattr(self, name) for name in ("q", "k", "v", "beta", "g")}
        some = {n: tokens_of(x, span) for n, x in arrays.items() if x is not None}
        return replace(self, **some)

    @property
    def state_dtype(self):
        return FLOAT_DTYPES["float64" if dtype_name(self.v.dtype) == "float64" else "float32"]

    def options(self) -> dict:
        return dict(scale=self.scale, qk_l2norm=self.qk_l2norm, chunk_size=self.chunk_size)


def reads(tokens: Tokens):
    """Return r_t, (B, T, HV, K), and P, (B, HV, K, K), of sequences that are batch rows."""
    B, T, HV, _ = tokens.v.shape
    K = tokens.k.shape[3]
    xp = module_of(tokens.v)
    identity = xp.zeros((B, HV, K, K), tokens.state_dtype)
    identity[...] = xp.eye(K, dtype=tokens.state_dtype)
    no_values = xp.zeros((B, T, HV, K), tokens.v.dtype)
    # A workspace would have the same buffers for this and for the calls that follow, where K = V.
    with left_aside():
        r, p = chunk_delta_rule(
            *(tokens.q, tokens.k, no_values, tokens.beta, tokens.g),
            initial_state=identity,
            **tokens.options(),
        )
    return r, p


def state_after(tokens: Tokens, initial_state):
    """Return the final states of batch rows."""
    with left_aside():
        return chunk_delta_rule(
            *(tokens.q, tokens.k, tokens.v, tokens.beta, tokens.g),
            initial_state=initial_state,
            **tokens.options(),
        ).final_state


def gradient_transfer(r, p, do, dfinal_state) -> Transfer:
    """Return what maps the gradient of a state that leaves to that of the one that entered.

    With `dfinal_state` for sequences that end on the rank: then nothing comes in from later ranks.
    """
    p_transposed = module_of(p).ascontiguousarray(p.swapaxes(-1, -2))
    transfer = Transfer(p_transposed, outer_sum(r, do))
    if dfinal_state is None:
        return transfer
    return Transfer(p_transposed, transfer.apply(dfinal_state))


# ---- over ranks ----------------------------------------------------------------------------------


def carried(
    communicator: Communicator, transfer: Transfer, through: tuple[bool, ...], backwards: bool
):
    """Return what all earlier ranks (all later ones with `backwards`) make of a state of zero.

    None, or anything, where no sequence comes from another rank.

    `through` tells of which ranks the transfer depends on what enters: of others P is not looked
    at, and may be None. The order of the products depends on the number of ranks alone.
    """
    direction = -1 if backwards else 1
    if not any(through):
        return _from_neighbour(communicator, transfer.h, direction)
    if transfer.p is None:
        shape = (*transfer.h.shape[:3], transfer.h.shape[2])
        transfer = Transfer(module_of(transfer.h).zeros(shape, transfer.h.dtype), transfer.h)
    combine = _by_gathering if communicator.size <= GATHERED else _by_scan
    return combine(communicator, transfer, through, direction)


def _from_neighbour(communicator, h, direction):
    """Return the state that the rank before this one leaves."""
    return communicator.shift(module_of(h).ascontiguousarray(h), direction)


def _by_gathering(communicator, transfer, through, direction):
    """Have all transfers, and apply those of the ranks before this one."""
    rank, size = communicator.rank, communicator.size
    every = communicator.all_gather(_packed(transfer))
    before = range(rank) if direction > 0 else range(size - 1, rank, -1)
    if not before:
        return module_of(transfer.h).zeros_like(transfer.h)
    # What comes before a rank that nothing goes through ends there.
    last = max(i for i, other in enumerate(before) if not through[other])
    backend = backend_for(module_of(transfer.h).__name__)
    return backend.joined(every, before[last:], transfer.h.shape)


def _by_scan(communicator, transfer, through, direction):
    """Compose with neighbours at distances 1, 2, 4, ..., so that a rank has all before it."""
    rank, size = communicator.rank, communicator.size
    distance = 1
    while distance < size:
        told = communicator.shift(_packed(transfer), direction * distance)
        # Of the ranks that the transfer spans by now; they end where the one that is told begins.
        spanned = [rank - direction * i for i in range(distance)]
        if told is not None and all(through[r] for r in spanned):
            transfer = _unpacked(told, transfer).then(transfer)
        distance *= 2
    return _from_neighbour(communicator, transfer.h, direction)


def _packed(transfer: Transfer):
    return module_of(transfer.h).concatenate([transfer.p.ravel(), transfer.h.ravel()])


def _unpacked(x, like: Transfer) -> Transfer:
    size = like.p.size
    return Transfer(x[:size].reshape(like.p.shape), x[size:].reshape(like.h.shape))


def collected(communicator: Communicator, rows, counts: tuple[int, ...], everywhere: bool, to: int):
    """Return the rows of all ranks in their order, on every rank or on rank `to`; else None.

    `counts` is how many rows each rank has.
    """
    if not everywhere and all(n == 0 for rank, n in enumerate(counts) if rank != to):
        return rows if communicator.rank == to else None
    xp = module_of(rows)
    padded = xp.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    every = communicator.all_gather(padded)
    if not everywhere and communicator.rank != to:
        return None
    return xp.concatenate([every[rank, :n] for rank, n in enumerate(counts)])
