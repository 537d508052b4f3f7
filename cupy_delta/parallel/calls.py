"""A rank's call: checked, agreed on with the other ranks, and cut."""

from __future__ import annotations

import operator
import zlib
from typing import Any, Literal

import numpy as np

from .. import problem as checks
from ..arrays import describe, looks
from ..raw import by_name
from .agreement import agree, agreed
from .cut import Cut, cut_batch, cut_sequences

MOST_TOKENS = 2**63 - 1
StatesOn = Literal["ends", "all"]


def agreed_cut(
    communicator, arrays, states, options, tokens, states_on, function
) -> tuple[checks.Problem, Cut]:
    """Check a rank's call, agree with the others on it, and return it with the cut."""
    _check_communicator(communicator)
    rank, size = communicator.rank, communicator.size
    found: dict[str, Any] = {}

    def described() -> dict:
        call = found["call"] = _checked(arrays, states, options, tokens, states_on, rank, size)
        return _note(call, tokens, states_on, function)

    known = agreed(communicator)
    key = _key(arrays, states, options, tokens, states_on, function)
    if key is not None and key in known:
        described()
        counts = list(tokens)
    else:
        notes = agree(communicator, described)
        counts = [note["tokens"] for note in notes]
        if key is not None:
            known.add(key)
    call = found["call"]
    if call.cu_seqlens is None:
        return call, cut_batch(rank, size, call.B)
    # The same on every rank: ends are those that all were told.
    ends, total = call.cu_seqlens, sum(counts)
    if ends[0] != 0 or ends[-1] != total or np.any(ends[1:] < ends[:-1]):
        raise ValueError(
            f"cu_seqlens: expected nondecreasing values from 0 to the tokens of all ranks, {total},"
            f" got {np.array2string(ends, threshold=8)}"
        )
    return call, cut_sequences(rank, counts, ends)


def _checked(arrays, states, options, tokens, states_on, rank, size) -> checks.Problem:
    """Check a rank's arrays and options; return the call on them, with all sequences."""
    q, k, v, beta, g, out = (arrays[name] for name in ("q", "k", "v", "beta", "g", "out"))
    # As a call of its own, for the values of the gate.
    checks.operator_problem(
        q, k, v, beta, g, initial_state=None, cu_seqlens=None, out=None, **options
    )
    initial_state, cu_seqlens = states["initial_state"], states["cu_seqlens"]
    found = looks(q, k, v, beta, g, initial_state, cu_seqlens, out)
    if cu_seqlens is not None and not isinstance(cu_seqlens, np.ndarray):
        raise TypeError(
            f"cu_seqlens: expected a NumPy array, got {describe(type(cu_seqlens))}; ranks decide"
            " by its values what they send"
        )
    option = (options[name] for name in ("scale", "qk_l2norm", "state_layout", "chunk_size"))
    call = checks.operator_call(found, ("B T HV",), *option, wide_states=True)
    _check_tokens(tokens, rank, size, call.T)
    if states_on not in ("ends", "all"):
        raise ValueError(f'states_on: expected "ends" or "all", got {states_on!r}')
    problem = call.of(arrays | states | by_name(beta, g))
    if out is not None:
        # Here, with the caller's own states: what a rank makes its call with are copies.
        checks.check_written(problem, "out")
    return problem


def _check_communicator(communicator) -> None:
    wanted = ("rank", "size", "all_gather", "shift")
    if not all(hasattr(communicator, name) for name in wanted):
        raise TypeError(
            "communicator: expected an object with rank, size, all_gather and shift,"
            f" got {describe(type(communicator))}"
        )


def _check_tokens(tokens, rank: int, size: int, T: int) -> None:
    if tokens is None:
        return
    counts = _integers(tokens)
    if len(counts) != size or any(n < 0 for n in counts):
        raise ValueError(
            f"tokens: expected a number of at least 0 for each of {size} ranks, got {list(counts)}"
        )
    if sum(counts) > MOST_TOKENS:  # 64 bits hold them where they are counted
        raise ValueError(f"tokens: expected at most {MOST_TOKENS} in all, got {list(counts)}")
    if counts[rank] != T:
        raise ValueError(f"tokens: expected T = {T} for rank {rank}, got {counts[rank]}")


def _integers(tokens) -> tuple[int, ...]:
    try:
        len(tokens)  # What has none is used up by reading it once.
        return tuple(operator.index(n) for n in tokens)
    except TypeError:
        raise TypeError(f"tokens: expected integers, one per rank, got {tokens!r}") from None


def _note(call: checks.Problem, tokens, states_on, function: str) -> dict:
    """Describe a call to the other ranks: what must be alike, and T."""
    ends = call.cu_seqlens
    alike = {
        "call": function,
        "arrays of": call.kind,
        "dtype of q, k and v": call.dtype.name,
        "dtype of beta": _dtype(call.beta, call.raw_beta),
        "dtype of g": _dtype(call.g, call.raw_gate),
        "formula of beta": call.raw_beta and call.raw_beta.scale,
        "formula of g": call.raw_gate and [str(x) for x in call.raw_gate],
        **{symbol: getattr(call, symbol) for symbol in ("B", "H", "HV", "K", "V", "N")},
        "gate": call.gate,
        "scale": call.scale,
        "qk_l2norm": call.qk_l2norm,
        "chunk_size": call.chunk_size,
        "state_layout": call.state_layout,
        "initial_state given": call.initial_state is not None,
        "states_on": states_on,
        # By a checksum: what a rank makes of other values would not fit together.
        "checksum of cu_seqlens": _checksum(ends),
        "tokens": _checksum(tokens),
    }
    return {"tokens": call.T, "alike": alike}


def _dtype(x, raw) -> str | None:
    """Name the dtype of an array, or of the logits in its place."""
    if raw is not None:
        return raw.dtype.name
    return None if x is None else np.dtype(x.dtype).name


def _agrees_at_no_cost(x) -> bool:
    """Whether telling each other is nothing beside computing, and no device waits for it."""
    return isinstance(x, np.ndarray)


def _checksum(values) -> int | None:
    return None if values is None else zlib.crc32(np.asarray(values, "<i8").tobytes())


def _key(arrays, states, options, tokens, states_on, function):
    """Return what a call is remembered by once agreed on; None for one that agrees every time.

    It holds nothing that one rank alone could change, but for what is wrong on that rank.
    """
    if tokens is None or _agrees_at_no_cost(arrays["v"]):
        return None
    ends = states["cu_seqlens"]
    ends = ends.tobytes() if isinstance(ends, np.ndarray) else None
    found = looks(*arrays.values(), *states.values())
    try:
        key = (found, ends, tuple(options.items()), _integers(tokens), states_on, function)
        hash(key)
    except TypeError:  # Raised where the call is checked, so that all ranks are told.
        return None
    return key
