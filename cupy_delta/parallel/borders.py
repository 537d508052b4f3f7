"""What crosses the borders of a rank's share: states going in, states coming out."""

from __future__ import annotations

from .. import problem as checks
from .. import raw
from ..arrays import module_of
from ..results import Transfer
from .calls import StatesOn
from .cut import Cut
from .transfers import Tokens, carried, collected, reads, state_after


def tokens_of(call: checks.Problem) -> Tokens:
    """Return a rank's tokens with the options of the call."""
    arrays = (call.q, call.k, call.v, *raw.as_given(call))
    return Tokens(*arrays, scale=call.scale, qk_l2norm=call.qk_l2norm, chunk_size=call.chunk_size)


def entering_states(communicator, call: checks.Problem, cut: Cut, given, told: Transfer | None):
    """Exchange transfers; return the states before the first tokens of a rank's sequences.

    `given` are those that the caller gave, or None, and are written.
    """
    if communicator.size > 1 and cut.lanes:
        told = no_transfer(call, cut) if told is None else told
        earlier = carried(communicator, told, cut.through, backwards=False)
        if cut.entering == cut.sequences > 0:
            return earlier
        if cut.entering:
            if given is None:
                shape = (cut.sequences, *earlier.shape[1:])
                given = module_of(earlier).zeros(shape, earlier.dtype)
            given[: cut.lanes] = earlier
    return given


def told_of(communicator, share: Tokens, cut: Cut, given, p) -> Transfer | None:
    """Return what a rank tells of the sequences that leave it; `p` is P, if it is known."""
    if communicator.size == 1 or not cut.leaving:
        return None
    leaving = share.part(cut.leaving_tokens())
    if cut.through[communicator.rank]:
        p = reads(leaving)[1] if p is None else p
        return Transfer(p, state_after(leaving, None))
    initial = None if given is None else given[cut.sequences - cut.lanes :]
    return Transfer(None, state_after(leaving, initial))


def no_transfer(call: checks.Problem, cut: Cut) -> Transfer:
    """Return the transfer that is told where no sequence is cut."""
    shape = (cut.lanes, call.HV, call.K, call.V)
    return Transfer(None, module_of(call.v).zeros(shape, call.state_dtype))


def own_call(share: Tokens, cut: Cut, initial) -> dict:
    """Return the arguments of a rank's own call."""
    arrays = {name: getattr(share, name) for name in ("q", "k", "v", "beta", "g")}
    states = dict(initial_state=initial, cu_seqlens=cut.cu_seqlens, state_layout="kv")
    return arrays | share.options() | states


def own_rows(call: checks.Problem, cut: Cut, states):
    """Return a copy of the states of a rank's sequences, (n, HV, K, V), if there are any states."""
    if states is None:
        return None
    rows = states[cut.first : cut.end]
    rows = rows if call.state_layout == "kv" else rows.swapaxes(-1, -2)
    return module_of(rows).array(rows, dtype=call.state_dtype, order="C")


def laid_out(states, call: checks.Problem):
    """Return states in the layout of a call."""
    if call.state_layout == "kv":
        return states
    return module_of(states).ascontiguousarray(states.swapaxes(-1, -2))


def final_states(communicator, call: checks.Problem, cut: Cut, states_on: StatesOn, final):
    """Return the final states of all sequences, where they are wanted."""
    ended = laid_out(final[: cut.sequences - cut.leaving], call)
    last = communicator.size - 1
    return collected(communicator, ended, cut.ends, states_on == "all", to=last)
