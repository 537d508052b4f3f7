"""The operators on a rank's share of the tokens: documentation, one agreement, one exchange."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import operators
from .. import problem as checks
from ..arrays import describe, looks, module_of
from ..results import (
    DeltaRuleForward,
    DeltaRuleGradients,
    DeltaRuleOutput,
    Residuals,
    Transfer,
)
from ..typing import Array, Integer, Real, StateLayout
from .agreement import agree, agreed
from .communicators import Communicator
from .cut import Cut, cut_batch, cut_sequences
from .transfers import (
    Tokens,
    carried,
    collected,
    gradient_transfer,
    reads,
    state_after,
    transfer_of,
)

Everywhere = Literal["ends", "all"]


@dataclass(frozen=True, eq=False)
class ParallelResiduals:
    """What a rank's forward hands to its backward; opaque to callers."""

    communicator: Communicator
    call: checks.Problem
    cut: Cut
    states_on: Everywhere
    own: Residuals
    reads: tuple[Any, Any] | None


def chunk_delta_rule(
    communicator: Communicator,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
    tokens: Sequence[int] | None = None,
    states_on: Everywhere = "ends",
) -> DeltaRuleOutput:
    """Apply the delta rule to sequences whose tokens are cut into the shares of ranks.

    Every rank calls this with its share, all in the same order of calls.

    Parameters
    ----------
    communicator : Communicator
        `NCCLCommunicator`, `MPICommunicator`, or any object that has what `Communicator` has.
    q, k, v, beta, g, scale, qk_l2norm, chunk_size, out
        As in `cupy_delta.chunk_delta_rule`, for this rank's T consecutive tokens. T may differ
        from rank to rank and be 0; everything else of their shapes, dtypes and options may not.
    initial_state : array, (N, HV, K, V), optional
        Of all sequences; given on every rank or on none. Each rank reads what begins there.
    cu_seqlens : integer array of NumPy, (N + 1,), optional
        Sequences in the tokens of all ranks together; the same on every rank.
    state_layout : {"kv", "vk"}
        Layout of the states' last two axes.
    tokens : sequence of int, optional
        How many tokens each rank has, the same on every rank. With CuPy arrays, calls that are
        alike then agree only once, and later ones exchange nothing but transfers; without it the
        host waits in every call until the ranks have told each other their T.
    states_on : {"ends", "all"}
        Which ranks are given `final_state`: the last one, or all.

    Returns
    -------
    DeltaRuleOutput
        ``o`` (B, T, HV, V) of this rank's tokens, and ``final_state`` (N, HV, K, V), or None on
        ranks that are not given it.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `cupy_delta.chunk_delta_rule`, on every rank what one of them met; and on every rank
        if calls differ where they may not.
    TimeoutError
        If a rank does not take part in time.

    Notes
    -----
    A rank tells the others K (K + V) floats per value head of what leaves it, once: in one
    all-gather up to 16 ranks, else in a scan of log2(size) steps. The result differs from that on
    one rank by rounding; it depends on the number of ranks and the cut, and on nothing else.

    References
    ----------
    docs/parallel.md and docs/derivation.md, section 3, of the project.

    Examples
    --------
    >>> import numpy as np
    >>> import cupy_delta
    >>> from cupy_delta import parallel
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 90, 2, 8))
    >>> beta = rng.uniform(0, 1, (1, 90, 2))
    >>> def share(communicator):
    ...     own = slice(30 * communicator.rank, 30 * communicator.rank + 30)
    ...     arrays = (x[:, own] for x in (q, k, v, beta))
    ...     return parallel.chunk_delta_rule(communicator, *arrays, qk_l2norm=True)
    >>> shares = parallel.in_threads(3, share)
    >>> o, state = cupy_delta.chunk_delta_rule(q, k, v, beta, qk_l2norm=True)
    >>> bool(np.allclose(np.concatenate([x.o for x in shares], axis=1), o))
    True
    >>> bool(np.allclose(shares[-1].final_state, state))
    True
    """
    options = dict(
        scale=scale, qk_l2norm=qk_l2norm, chunk_size=chunk_size, state_layout=state_layout
    )
    arrays = dict(q=q, k=k, v=v, beta=beta, g=g, out=out)
    states = dict(initial_state=initial_state, cu_seqlens=cu_seqlens)
    call, cut = _agreed_cut(communicator, arrays, states, options, tokens, states_on, "forward")
    share = _tokens(call)
    initial = _entering(communicator, share, call, cut, p=None)
    rule = operators.chunk_delta_rule
    o, final = rule(**_local(share, cut, initial), out=out)
    return DeltaRuleOutput(o, _final(communicator, call, cut, states_on, final))


def chunk_delta_rule_fwd(
    communicator: Communicator,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
    tokens: Sequence[int] | None = None,
    states_on: Everywhere = "ends",
) -> DeltaRuleForward:
    """Do as `chunk_delta_rule` does, and keep what the gradients need.

    Parameters
    ----------
    communicator, q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, chunk_size
    state_layout, out, tokens, states_on
        As in `chunk_delta_rule`. The arrays must not change before the backward.

    Returns
    -------
    DeltaRuleForward
        ``o``, ``final_state`` and the opaque ``residuals`` for `chunk_delta_rule_bwd`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, TimeoutError
        As in `chunk_delta_rule`.

    Notes
    -----
    Beside what `cupy_delta.chunk_delta_rule_fwd` keeps, a rank that a sequence enters keeps K
    numbers per token and value head, in the dtype of v: what each output reads of that state.

    References
    ----------
    docs/parallel.md of the project.

    Examples
    --------
    See `chunk_delta_rule_bwd`.
    """
    options = dict(
        scale=scale, qk_l2norm=qk_l2norm, chunk_size=chunk_size, state_layout=state_layout
    )
    arrays = dict(q=q, k=k, v=v, beta=beta, g=g, out=out)
    states = dict(initial_state=initial_state, cu_seqlens=cu_seqlens)
    call, cut = _agreed_cut(communicator, arrays, states, options, tokens, states_on, "training")
    share = _tokens(call)
    entering = reads(share.part(cut.entering_tokens())) if cut.entering else None
    initial = _entering(communicator, share, call, cut, p=None if entering is None else entering[1])
    o, final, own = operators.chunk_delta_rule_fwd(**_local(share, cut, initial), out=out)
    residuals = ParallelResiduals(communicator, call, cut, states_on, own, entering)
    return DeltaRuleForward(o, _final(communicator, call, cut, states_on, final), residuals)


def chunk_delta_rule_bwd(
    residuals: ParallelResiduals, do: Array, dfinal_state: Array | None = None
) -> DeltaRuleGradients:
    """Compute the gradients of a rank's share, exactly.

    Parameters
    ----------
    residuals : ParallelResiduals
        Those of this rank's `chunk_delta_rule_fwd`.
    do : array, (B, T, HV, V)
        Gradient with respect to this rank's ``o``, in its dtype.
    dfinal_state : array, (N, HV, K, V), optional
        Gradient with respect to ``final_state``, of all sequences; zero by default. Each rank
        reads what ends there, so without `cu_seqlens` it matters on the last rank alone.

    Returns
    -------
    DeltaRuleGradients
        Gradients of this rank's q, k, v, beta and g, and that of ``initial_state`` (N, HV, K, V) on
        the first rank, or on all with ``states_on="all"``; None elsewhere, and for absent inputs.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, TimeoutError
        As in `cupy_delta.chunk_delta_rule_bwd`; with NumPy arrays on every rank.

    Notes
    -----
    The transposed transfers are exchanged as the forward's are, from the last rank to the first.

    References
    ----------
    docs/parallel.md of the project.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_delta import parallel
    >>> k, v = np.ones((1, 1, 1, 1)), np.array([3.0, 5.0])
    >>> def share(communicator):
    ...     own = np.full((1, 1, 1, 1), v[communicator.rank])
    ...     call = communicator, k, k, own, np.full((1, 1, 1), 0.5)
    ...     o, final_state, residuals = parallel.chunk_delta_rule_fwd(*call)
    ...     return parallel.chunk_delta_rule_bwd(residuals, np.ones_like(o)).v.item()
    >>> parallel.in_threads(2, share)
    [0.75, 0.5]
    """
    wanted = "those of parallel.chunk_delta_rule_fwd"
    checks.instance("residuals", residuals, ParallelResiduals, wanted)
    communicator, call, cut = residuals.communicator, residuals.call, residuals.cut

    def checked() -> dict:
        checks.backward_arrays(call, do, dfinal_state)
        return {"alike": {"call": "backward"}}

    if call.kind == "numpy":
        agree(communicator, checked)
    else:
        checked()
    dfinal = None if dfinal_state is None else _rows(call, cut, dfinal_state)
    told = _nothing(call, cut)
    if residuals.reads is not None:
        ends_here = dfinal is not None and not cut.through[communicator.rank]
        ending = dfinal[: cut.lanes] if ends_here else None
        told = gradient_transfer(*residuals.reads, do[:, cut.entering_tokens()], ending)
    if communicator.size > 1 and cut.lanes:
        later = carried(communicator, told, cut.through, backwards=True)
        if cut.leaving:
            if dfinal is None:
                dfinal = module_of(later).zeros((cut.sequences, *later.shape[1:]), later.dtype)
            dfinal[cut.sequences - cut.lanes :] = later
    own = operators.chunk_delta_rule_bwd(residuals.own, do, dfinal)
    dinitial = None
    if call.initial_state is not None:
        begun = _laid_out(own.initial_state[cut.entering :], call)
        everywhere = residuals.states_on == "all"
        dinitial = collected(communicator, begun, cut.begins, everywhere, to=0)
    return own._replace(initial_state=dinitial)


# ---- a call and its cut --------------------------------------------------------------------------


def _agreed_cut(communicator, arrays, states, options, tokens, states_on, function):
    """Check a rank's call, agree with the others on it, and return it with the cut."""
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
    # As a call of its own, for the values of the gate and the memory of `out`.
    checks.operator_problem(
        q, k, v, beta, g, initial_state=None, cu_seqlens=None, out=out, **options
    )
    initial_state, cu_seqlens = states["initial_state"], states["cu_seqlens"]
    found = looks(q, k, v, beta, g, initial_state, cu_seqlens, out)
    if cu_seqlens is not None and not isinstance(cu_seqlens, np.ndarray):
        raise TypeError(
            f"cu_seqlens: expected a NumPy array, got {describe(type(cu_seqlens))}; ranks decide"
            " by its values what they send"
        )
    option = (options[name] for name in ("scale", "qk_l2norm", "state_layout", "chunk_size"))
    call = checks.operator_call(found, ("B T HV",), *option)
    _check_tokens(tokens, rank, size, call.T)
    if states_on not in ("ends", "all"):
        raise ValueError(f'states_on: expected "ends" or "all", got {states_on!r}')
    return call.of(arrays | states)


def _check_tokens(tokens, rank: int, size: int, T: int) -> None:
    if tokens is None:
        return
    if len(tokens) != size or any(n < 0 for n in tokens):
        raise ValueError(
            f"tokens: expected a number of at least 0 for each of {size} ranks, got {list(tokens)}"
        )
    if tokens[rank] != T:
        raise ValueError(f"tokens: expected T = {T} for rank {rank}, got {tokens[rank]}")


def _note(call: checks.Problem, tokens, states_on, function: str) -> dict:
    """Describe a call to the other ranks: what must be alike, and T."""
    ends = call.cu_seqlens
    alike = {
        "call": function,
        "arrays of": call.kind,
        "dtype of q, k and v": call.dtype.name,
        "dtype of beta": np.dtype(call.beta.dtype).name,
        "dtype of g": None if call.g is None else np.dtype(call.g.dtype).name,
        **{symbol: getattr(call, symbol) for symbol in ("B", "H", "HV", "K", "V", "N")},
        "gate": call.gate,
        "scale": call.scale,
        "qk_l2norm": call.qk_l2norm,
        "chunk_size": call.chunk_size,
        "state_layout": call.state_layout,
        "initial_state given": call.initial_state is not None,
        "states_on": states_on,
        # By a checksum: what a rank makes of other values would not fit together.
        "checksum of cu_seqlens": None
        if ends is None
        else zlib.crc32(ends.astype("<i8").tobytes()),
        "tokens": None if tokens is None else zlib.crc32(np.asarray(tokens, "<i8").tobytes()),
    }
    return {"tokens": call.T, "alike": alike}


def _checksum(values) -> int | None:
    return None if values is None else zlib.crc32(np.asarray(values, "<i8").tobytes())


def _key(arrays, states, options, tokens, states_on, function):
    """Return what a call is remembered by once agreed on; None for one that agrees every time.

    It holds nothing that one rank alone could change, but for what is wrong on that rank.
    """
    if tokens is None or isinstance(arrays["v"], np.ndarray):
        return None
    ends = states["cu_seqlens"]
    ends = ends.tobytes() if isinstance(ends, np.ndarray) else None
    found = looks(*arrays.values(), *states.values())
    return (found, ends, tuple(options.items()), tuple(tokens), states_on, function)


def _tokens(call: checks.Problem) -> Tokens:
    arrays = (getattr(call, name) for name in ("q", "k", "v", "beta", "g"))
    return Tokens(*arrays, call.scale, call.qk_l2norm, call.chunk_size)


# ---- what crosses the borders of ranks -----------------------------------------------------------


def _entering(communicator, share: Tokens, call: checks.Problem, cut: Cut, p):
    """Exchange transfers; return the states before the first tokens of a rank's sequences.

    `p` is the P of what enters, if it is known.
    """
    given = None if call.initial_state is None else _rows(call, cut, call.initial_state)
    if communicator.size > 1 and cut.lanes:
        told = _told(communicator, share, call, cut, given, p)
        earlier = carried(communicator, told, cut.through, backwards=False)
        if cut.entering:
            if given is None:
                shape = (cut.sequences, *earlier.shape[1:])
                given = module_of(earlier).zeros(shape, earlier.dtype)
            given[: cut.lanes] = earlier
    return given


def _told(communicator, share: Tokens, call: checks.Problem, cut: Cut, given, p) -> Transfer:
    """Return what a rank tells of the sequences that leave it."""
    if not cut.leaving:
        return _nothing(call, cut)
    leaving = share.part(cut.leaving_tokens())
    if cut.through[communicator.rank]:
        return transfer_of(leaving, p)
    initial = None if given is None else given[cut.sequences - cut.lanes :]
    nothing = _nothing(call, cut)
    return nothing._replace(h=state_after(leaving, initial))


def _nothing(call: checks.Problem, cut: Cut) -> Transfer:
    """Return the transfer that is told where no sequence is cut."""
    xp, heads = module_of(call.v), (cut.lanes, call.HV, call.K)
    return Transfer(*(xp.zeros((*heads, n), call.state_dtype) for n in (call.K, call.V)))


def _local(share: Tokens, cut: Cut, initial) -> dict:
    """Return the arguments of a rank's own call."""
    arrays = {name: getattr(share, name) for name in ("q", "k", "v", "beta", "g")}
    return arrays | share.options() | dict(initial_state=initial, cu_seqlens=cut.cu_seqlens)


def _rows(call: checks.Problem, cut: Cut, states):
    """Return a copy of the states of a rank's sequences, (n, HV, K, V)."""
    rows = states[cut.first : cut.end]
    rows = rows if call.state_layout == "kv" else rows.swapaxes(-1, -2)
    return module_of(rows).array(rows, dtype=call.state_dtype, order="C")


def _laid_out(states, call: checks.Problem):
    """Return states in the layout of a call."""
    if call.state_layout == "kv":
        return states
    return module_of(states).ascontiguousarray(states.swapaxes(-1, -2))


def _final(communicator, call: checks.Problem, cut: Cut, states_on: Everywhere, final):
    """Return the final states of all sequences, where they are wanted."""
    ended = _laid_out(final[: cut.sequences - cut.leaving], call)
    last = communicator.size - 1
    return collected(communicator, ended, cut.ends, states_on == "all", to=last)
