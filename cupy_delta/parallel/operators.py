"""The operators on a rank's share of the tokens: documentation, one agreement, one exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import operators
from .. import problem as checks
from ..arrays import module_of
from ..raw import Gate, SigmoidBeta
from ..results import DeltaRuleGradients, DeltaRuleOutput, Residuals, Transfer
from ..typing import Array, Integer, Real, StateLayout
from . import halves
from .agreement import agree
from .borders import (
    entering_states,
    final_states,
    laid_out,
    no_transfer,
    own_call,
    own_rows,
    tokens_of,
    told_of,
)
from .calls import StatesOn, agreed_cut
from .communicators import Communicator, finish
from .cut import Cut
from .transfers import carried, collected, gradient_transfer, reads


@dataclass(frozen=True, eq=False)
class ParallelResiduals:
    """What a rank's forward hands to its backward; opaque to callers."""

    communicator: Communicator
    call: checks.Problem
    cut: Cut
    states_on: StatesOn
    own: Residuals
    reads: tuple[Any, Any] | None
    in_halves: bool


class ParallelForward(NamedTuple):
    """Outputs, final states, and the residuals that `chunk_delta_rule_bwd` takes."""

    o: Any
    final_state: Any
    residuals: ParallelResiduals


def chunk_delta_rule(
    communicator: Communicator,
    q: Array,
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
    tokens: Sequence[int] | None = None,
    states_on: StatesOn = "ends",
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
    call, cut = agreed_cut(communicator, arrays, states, options, tokens, states_on, "forward")
    share, given = tokens_of(call), own_rows(call, cut, initial_state)
    begun = halves.begin_forward(share, call, cut, given, out, training=False)
    told = begun.told if begun else told_of(communicator, share, cut, given, p=None)
    initial = entering_states(communicator, call, cut, given, told)
    if begun:
        o, final, _ = begun.finish(initial)
    else:
        o, final = operators.chunk_delta_rule(**own_call(share, cut, initial), out=out)
    final = final_states(communicator, call, cut, states_on, final)
    finish(communicator)
    return DeltaRuleOutput(o, final)


def chunk_delta_rule_fwd(
    communicator: Communicator,
    q: Array,
    k: Array,
    v: Array,
    beta: Array | SigmoidBeta,
    g: Array | Gate | None = None,
    *,
    scale: Real | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    qk_l2norm: bool = False,
    chunk_size: Integer | None = None,
    state_layout: StateLayout = "kv",
    out: Array | None = None,
    tokens: Sequence[int] | None = None,
    states_on: StatesOn = "ends",
) -> ParallelForward:
    """Do as `chunk_delta_rule` does, and keep what the gradients need.

    Parameters
    ----------
    communicator, q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, chunk_size
    state_layout, out, tokens, states_on
        As in `chunk_delta_rule`. The arrays must not change before the backward.

    Returns
    -------
    ParallelForward
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
    call, cut = agreed_cut(communicator, arrays, states, options, tokens, states_on, "training")
    share, given = tokens_of(call), own_rows(call, cut, initial_state)
    begun, entering = halves.begin_forward(share, call, cut, given, out, training=True), None
    if begun:
        o, final, own = begun.finish(entering_states(communicator, call, cut, given, begun.told))
    else:
        if cut.entering:
            entering = reads(share.part(cut.entering_tokens()))
        told = told_of(communicator, share, cut, given, p=entering and entering[1])
        initial = entering_states(communicator, call, cut, given, told)
        o, final, own = operators.chunk_delta_rule_fwd(**own_call(share, cut, initial), out=out)
    kept = own, entering, begun is not None
    residuals = ParallelResiduals(communicator, call, cut, states_on, *kept)
    final = final_states(communicator, call, cut, states_on, final)
    finish(communicator)
    return ParallelForward(o, final, residuals)


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
        Of the parameters of a raw gate they are what this rank's tokens add: to be summed over
        ranks.

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

    def checked() -> dict[str, Any]:
        checks.backward_arrays(call, do, dfinal_state)
        return {"alike": {"call": "backward"}}

    if call.kind == "numpy":
        agree(communicator, checked)
    else:
        checked()
    dfinal = own_rows(call, cut, dfinal_state)
    begun = halves.Backward(residuals.own, cut, do, dfinal) if residuals.in_halves else None
    told = begun.told if begun else _told_backwards(residuals, do, dfinal)
    if communicator.size > 1 and cut.lanes:
        told = no_transfer(call, cut) if told is None else told
        later = carried(communicator, told, cut.through, backwards=True)
        if cut.leaving == cut.sequences > 0:
            dfinal = later
        elif cut.leaving:
            if dfinal is None:
                dfinal = module_of(later).zeros((cut.sequences, *later.shape[1:]), later.dtype)
            dfinal[cut.sequences - cut.lanes :] = later
    own = (
        begun.finish(dfinal) if begun else operators.chunk_delta_rule_bwd(residuals.own, do, dfinal)
    )
    dinitial = None
    if call.initial_state is not None:
        started = laid_out(own.initial_state[cut.entering :], call)
        everywhere = residuals.states_on == "all"
        dinitial = collected(communicator, started, cut.begins, everywhere, to=0)
    finish(communicator)
    return own._replace(initial_state=dinitial)


def _told_backwards(residuals: ParallelResiduals, do: Any, dfinal: Any) -> Transfer | None:
    """Return what a rank tells of the gradients of sequences that enter it."""
    cut = residuals.cut
    if residuals.reads is None:
        return None
    ending = None
    if dfinal is not None and not cut.through[residuals.communicator.rank]:
        ending = dfinal[: cut.lanes]
    return gradient_transfer(*residuals.reads, do[:, cut.entering_tokens()], ending)
