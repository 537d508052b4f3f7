"""Problem: one call, checked. Every check of every argument lives here and in checker.py.

What goes by the looks of arrays and by options is checked once for all calls that are alike in
them: the functions that are `remembered` are given no array. Values and memory are checked in
every call.

Symbols: B batch, T time, N sequences, H key heads, HV value heads, K and V key and value
dimensions, C chunk. Shapes are written as strings of symbols, e.g. ``"B T H K"``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import describe, looks, places, shares_memory
from .call import Call
from .checker import (
    Checker,
    PassedCalls,
    chunk_size_of,
    options_of,
    pool_look,
    pool_of,
    qk_l2norm_of,
    remembered,
    scale_of,
)
from .raw import by_name

MAX_STEP_TOKENS = 32  # sixteen drafts, after as many tokens that were accepted before
SIZES = ("B", "T", "N", "H", "HV", "K", "V")
# A pool of states, and what there is of each sequence.
ON_POOL = ("state", "state_indices", "output_state_indices", "fresh")
NO_POOL = ((None,) * len(ON_POOL), None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem(Call):
    """A checked call with its arrays, None where absent; they live where `kind` says.

    It shares `kept` with all problems that are the same `Call`, so no array may go into it.
    """

    kind: str
    q: Any = None
    k: Any = None
    v: Any = None
    beta: Any = None
    g: Any = None
    # In the place of beta and g, where they are formed of these.
    logits: Any = None
    a: Any = None
    A_log: Any = None
    dt_bias: Any = None
    initial_state: Any = None
    cu_seqlens: Any = None
    out: Any = None
    w: Any = None
    u: Any = None
    v_new: Any = None
    states: Any = None
    state: Any = None
    state_indices: Any = None
    output_state_indices: Any = None
    fresh: Any = None
    accepted: Any = None
    passed: Any = None  # where all of them lie in device memory: the `Passed` of that

    # Two problems that are alike still have different arrays.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def of(self, arrays: dict) -> Problem:
        """Return this problem with arrays, which must look as those that were checked."""
        problem = object.__new__(Problem)
        object.__setattr__(problem, "__dict__", vars(self) | arrays)
        return problem

    def sequences(self) -> list[tuple[int, int, int, int]]:
        """Return (batch row, first token, end token, first chunk's token) of each sequence.

        Only for a `cu_seqlens` that lies on the host.
        """
        if self.cu_seqlens is None:
            return [(b, 0, self.T, b) for b in range(self.B)]
        ends = self.cu_seqlens.tolist()
        return [(0, ends[n], ends[n + 1], n) for n in range(self.N)]


# ---- calls ---------------------------------------------------------------------------------------


def operator_problem(
    q,
    k,
    v,
    beta,
    g,
    *,
    scale,
    initial_state,
    cu_seqlens,
    qk_l2norm,
    state_layout,
    out,
    chunk_size=None,
    beta_shapes=("B T HV",),
    checkpoint_every=None,
    **on_pool,
) -> Problem:
    """Check a call of an operator over whole sequences; `on_pool`, of states in a pool."""
    found = looks(q, k, v, beta, g, initial_state, cu_seqlens, out)
    options = scale, qk_l2norm, state_layout, chunk_size
    arrays = by_name(
        beta, g, q=q, k=k, v=v, initial_state=initial_state, cu_seqlens=cu_seqlens, out=out
    )
    if checkpoint_every is None and all(x is None for x in on_pool.values()):
        problem = _with_values(operator_call(found, beta_shapes, *options).of(arrays))
    else:
        pool = looks(*(on_pool[name] for name in ON_POOL)), pool_look(on_pool["state"])
        alike = operator_call(found, beta_shapes, *options, checkpoint_every, pool)
        problem = _with_values(alike.of(arrays | on_pool))
        if problem.state is not None:
            _check_slots(problem)
            check_written(problem, "state")
    if out is not None:
        check_written(problem, "out")
    return problem


@remembered
def operator_call(
    found,
    beta_shapes,
    scale,
    qk_l2norm,
    state_layout,
    chunk_size,
    checkpoint_every=None,
    pool=NO_POOL,
    wide_states=False,
) -> Problem:
    """Check such a call by the looks of its arrays: a problem without arrays.

    `pool` are the looks of `ON_POOL`, and how the pool lies in memory. `wide_states`: initial
    states are to be of the dtype of sums.
    """
    q, k, v, beta, g, initial_state, cu_seqlens, out = found
    check = Checker("q", q)
    check.q_k_v_beta_g(q, k, v, beta, g, beta_shapes)
    check.sequences(cu_seqlens)
    options = options_of(check, scale, qk_l2norm, state_layout)
    symbols = options.pop("symbols")
    if initial_state is not None:
        dtypes = (check.state_dtype,) if wide_states else check.state_dtypes
        check.array("initial_state", initial_state, symbols, dtypes)
    options |= _pool_of_sequences(check, symbols, initial_state, *pool)
    options["checkpoint_every"] = chunk_size_of(checkpoint_every, "checkpoint_every")
    check.output(out)
    return _problem(check, **options, chunk_size=chunk_size_of(chunk_size))


def _pool_of_sequences(check: Checker, symbols: str, initial_state, found, lies) -> dict:
    """Check a pool from which whole sequences take their states and to which they return them."""
    state, state_indices, output_state_indices, fresh = found
    if state is None:
        for name, x in zip(ON_POOL, found, strict=True):
            if x is not None:
                raise ValueError(f"{name}: expected None without a state, a pool of slots")
        return {}
    if initial_state is not None:
        raise ValueError("initial_state: expected None with a state, whose slots are read")
    if fresh is not None:
        check.mask("fresh", fresh, "N")
    indices = dict(state_indices=state_indices, output_state_indices=output_state_indices)
    return pool_of(check, symbols, state, lies, "N", **indices)


def step_problem(
    q,
    k,
    v,
    beta,
    g,
    *,
    state,
    state_indices,
    scale,
    qk_l2norm,
    state_layout,
    out,
    output_state_indices=None,
    cu_seqlens=None,
    accepted=None,
) -> Problem:
    """Check a decoding step; one that has passed on the same memory of a device, by that alone."""
    named = (state_indices, output_state_indices, cu_seqlens, accepted)
    lies = places(q, k, v, beta, g, out, state, *named)
    passed = None
    if lies is not None:
        key = (lies, scale, type(scale), qk_l2norm, type(qk_l2norm), state_layout)
        passed = _steps_that_passed.find(key)
        if passed is not None and passed.again is not None:
            return passed.problem  # nothing else of the call is asked for
    arrays = by_name(
        beta,
        g,
        q=q,
        k=k,
        v=v,
        state=state,
        out=out,
        state_indices=state_indices,
        output_state_indices=output_state_indices,
        cu_seqlens=cu_seqlens,
        accepted=accepted,
    )
    if passed is not None:
        return passed.problem.of(arrays)
    found = looks(q, k, v, beta, g, out, state, *named)
    alike = step_call(found, scale, qk_l2norm, state_layout, pool_look(state))
    problem = alike.of(arrays)
    if cu_seqlens is None:
        _check_gates(g)
    else:
        _check_lengths(_with_values(problem))
    if accepted is not None:
        _check_accepted(problem)
    if state_indices is not None or output_state_indices is not None:
        _check_slots(problem, _idle(problem))
    check_written(problem, "state")
    if out is not None:
        check_written(problem, "out")
    if lies is not None:
        return problem.of({"passed": _steps_that_passed.keep(key, alike)})
    return problem


_steps_that_passed = PassedCalls()


@remembered
def step_call(found, scale, qk_l2norm, state_layout, lies=None) -> Problem:
    """Check such a call by the looks of its arrays: a problem without arrays."""
    q, k, v, beta, g, out, state, state_indices, output_state_indices, cu_seqlens, accepted = found
    check = Checker("q", q)
    check.q_k_v_beta_g(q, k, v, beta, g)
    T = check.sizes["T"]
    if cu_seqlens is None and T > MAX_STEP_TOKENS:
        raise ValueError(
            f"q: expected T of at most {MAX_STEP_TOKENS} new tokens, got T = {T};"
            " chunk_delta_rule takes any number"
        )
    check.sequences(cu_seqlens)
    options = options_of(check, scale, qk_l2norm, state_layout)
    symbols = options.pop("symbols")
    indices = dict(state_indices=state_indices, output_state_indices=output_state_indices)
    of_sequences = indices if accepted is None else indices | {"accepted": accepted}
    count = "B" if cu_seqlens is None else "N"
    options |= pool_of(check, symbols, state, lies, count, **of_sequences)
    check.output(out)
    return _problem(check, **options, accepting=accepted is not None)


def backward_arrays(problem: Problem, do, dfinal_state) -> None:
    """Check the gradients that enter the backward against the forward's problem."""
    found = looks(do, dfinal_state)
    if found in problem.kept:
        return
    check = Checker("v", looks(problem.v)[0])
    for symbol in ("B", "T", "N", "HV", "K", "V"):
        check.sizes[symbol], check.source[symbol] = getattr(problem, symbol), "the forward"
    do, dfinal_state = found
    check.array("do", do, "B T HV V", (check.dtype,))
    if dfinal_state is not None:
        check.array("dfinal_state", dfinal_state, problem.state_symbols, (check.state_dtype,))
    problem.kept[found] = "checked"


def factors_problem(k, v, beta, g, *, qk_l2norm, cu_seqlens, chunk_size=None) -> Problem:
    """Check a call of `wy_factors` or `sequence_transfer`."""
    alike = _factors(looks(k, v, beta, g, cu_seqlens), qk_l2norm, chunk_size)
    return _with_values(alike.of(by_name(beta, g, k=k, v=v, cu_seqlens=cu_seqlens)))


@remembered
def _factors(found, qk_l2norm, chunk_size) -> Problem:
    k, v, beta, g, cu_seqlens = found
    check = Checker("k", k)
    check.q_k_v_beta_g(None, k, v, beta, g)
    check.sequences(cu_seqlens)
    return _pieces(check, qk_l2norm, chunk_size)


def state_pass_problem(k, w, u, g, *, initial_state, qk_l2norm, cu_seqlens, chunk_size) -> Problem:
    """Check a call of `state_pass`."""
    alike = _state_pass(looks(k, w, u, g, initial_state, cu_seqlens), qk_l2norm, chunk_size)
    arrays = by_name(None, g, k=k, w=w, u=u, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return _with_values(alike.of(arrays))


@remembered
def _state_pass(found, qk_l2norm, chunk_size) -> Problem:
    k, w, u, g, initial_state, cu_seqlens = found
    check = Checker("k", k)
    check.array("k", k, "B T H K", (check.dtype,))
    check.array("w", w, "B T HV K", (check.dtype,))
    check.array("u", u, "B T HV V", (check.dtype,))
    check.gate(g)
    check.sequences(cu_seqlens)
    if initial_state is not None:
        check.array("initial_state", initial_state, "N HV K V", (check.state_dtype,))
    return _pieces(check, qk_l2norm, chunk_size)


def chunk_output_problem(
    q, k, v_new, states, g, *, scale, qk_l2norm, cu_seqlens, chunk_size
) -> Problem:
    """Check a call of `chunk_output`; the backend checks the chunk axis of `states`."""
    found = looks(q, k, v_new, states, g, cu_seqlens)
    alike = _chunk_output(found, scale, qk_l2norm, chunk_size)
    arrays = by_name(None, g, q=q, k=k, v_new=v_new, states=states, cu_seqlens=cu_seqlens)
    return _with_values(alike.of(arrays))


@remembered
def _chunk_output(found, scale, qk_l2norm, chunk_size) -> Problem:
    q, k, v_new, states, g, cu_seqlens = found
    check = Checker("q", q)
    check.array("q", q, "B T H K", (check.dtype,))
    check.array("k", k, "B T H K", (check.dtype,))
    check.array("v_new", v_new, "B T HV V", (check.dtype,))
    check.gate(g)
    check.sequences(cu_seqlens)
    check.array("states", states, "B chunks HV K V", (check.state_dtype,))
    return _pieces(check, qk_l2norm, chunk_size, scale=scale_of(scale, check.sizes["K"]))


def _pieces(check: Checker, qk_l2norm, chunk_size, **options) -> Problem:
    """Return the problem of a building block."""
    options |= dict(qk_l2norm=qk_l2norm_of(qk_l2norm), chunk_size=chunk_size_of(chunk_size))
    return _problem(check, **options)


def check_chunk_axis(call: Call, chunk: int) -> None:
    """Check the chunk axis of `states` once the chunk size is settled."""
    slots = call.chunk_slots(chunk)
    if call.chunks not in (None, slots):
        shape = (call.B, call.chunks, call.HV, call.K, call.V)
        raise ValueError(
            f"states: expected {slots} chunks of chunk_size = {chunk} along axis 1,"
            f" got shape {shape}"
        )


def check_checkpoints(call: Call, chunk: int) -> None:
    """Check `checkpoint_every` once the chunk size is settled."""
    if call.checkpoint_every is not None and call.checkpoint_every % chunk:
        raise ValueError(
            f"checkpoint_every: expected a multiple of chunk_size = {chunk},"
            f" got {call.checkpoint_every}"
        )


def instance(name: str, x, cls: type, wanted: str) -> None:
    """Check that an argument is one of the library's own objects."""
    if not isinstance(x, cls):
        raise TypeError(f"{name}: expected {wanted}, got {describe(type(x))}")


def affine_arrays(p, h, operands: dict) -> str:
    """Check a transfer's own arrays and what meets them; return their kind.

    `operands` maps a name to an array of the shape of `h`, or of that of `p` when the name ends
    in ``.p``.
    """
    h, p, *others = looks(h, p, *operands.values())
    check = Checker("h", h)
    check.array("h", h, "N HV K V", (check.dtype,))
    check.array("p", p, "N HV K K", (check.dtype,))
    for name, x in zip(operands, others, strict=True):
        check.array(name, x, "N HV K K" if name.endswith(".p") else "N HV K V", (check.dtype,))
    return check.kind


def _problem(check: Checker, **options: Any) -> Problem:
    """Return what was checked, without arrays."""
    described: dict[str, Any] = {s: check.sizes.get(s, 0) for s in SIZES}
    described["pool_slots"] = check.sizes.get("slots", 0)
    described["chunks"] = check.sizes.get("chunks")
    rank = {name: len(axes) for name, axes in check.axes.items()}
    described["gate"] = {3: "scalar", 4: "channel"}.get(rank.get("g", 0))
    described["narrow_gate"] = check.narrow_gate
    described["beta_per_value"] = rank.get("beta") == 4
    described["varlen"] = "cu_seqlens" in rank
    described |= dict(raw_gate=check.raw_gate, raw_beta=check.raw_beta)
    return Problem(kind=check.kind, dtype=check.dtype, **described, **options)


# ---- values and memory, in every call ------------------------------------------------------------


# Gates are sums and products of roundings; one that is above 0 by more is none.
LARGEST_GATE = 1e-3


def _with_values(problem: Problem) -> Problem:
    """Check the values of g and `cu_seqlens` where they lie on the host; others are never read."""
    _check_gates(problem.g)
    ends, T = problem.cu_seqlens, problem.T
    if isinstance(ends, np.ndarray):
        # Compared, not subtracted: a difference of integers may wrap round.
        falls = np.any(ends[1:] < ends[:-1])
        if ends[0] != 0 or ends[-1] != T or falls:
            raise ValueError(
                f"cu_seqlens: expected nondecreasing values from 0 to T = {T},"
                f" got {np.array2string(ends, threshold=8)}"
            )
    return problem


def _check_lengths(problem: Problem) -> None:
    """Check that no sequence of a step is long, where `cu_seqlens` lies on the host."""
    ends = problem.cu_seqlens
    if not isinstance(ends, np.ndarray) or len(ends) == 1:
        return
    longest = int((ends[1:] - ends[:-1]).max())
    if longest > MAX_STEP_TOKENS:
        raise ValueError(
            f"cu_seqlens: expected at most {MAX_STEP_TOKENS} new tokens per sequence,"
            f" got {longest}; chunk_delta_rule takes any number"
        )


def _check_accepted(problem: Problem) -> None:
    """Check how many tokens are accepted, where that lies on the host."""
    accepted, ends = problem.accepted, problem.cu_seqlens
    if not isinstance(accepted, np.ndarray):
        return
    tokens: Any = problem.T
    if ends is not None:
        tokens = ends[1:] - ends[:-1] if isinstance(ends, np.ndarray) else MAX_STEP_TOKENS
    wrong = np.flatnonzero((accepted < 0) | (accepted > tokens))
    if len(wrong):
        n = int(wrong[0])
        most = np.broadcast_to(tokens, accepted.shape)[n]
        raise ValueError(
            f"accepted: expected 0 to {most} of the tokens of sequence {n}, got {accepted[n]}"
        )


def _idle(problem: Problem) -> np.ndarray | None:
    """Mask sequences of a step that write nothing: padding, and slots that stay as they are."""
    read, written, accepted = (
        getattr(problem, name) for name in ("state_indices", "output_state_indices", "accepted")
    )
    idle = read < 0 if isinstance(read, np.ndarray) else None
    if isinstance(accepted, np.ndarray):
        own: Any = written is None or written is read
        if not own and isinstance(written, np.ndarray):
            start = np.arange(len(written)) if read is None else read
            own = written == start if isinstance(start, np.ndarray) else False
        left = (accepted == 0) & own
        idle = left if idle is None else idle | left
    return idle


def _check_gates(g) -> None:
    """Check that gates on the host decay; NaN goes where the arithmetic takes it.

    The reduction skips NaN and, unlike a comparison, makes no array of the size of g.
    """
    if not isinstance(g, np.ndarray):
        return
    largest = np.fmax.reduce(g, axis=None, initial=0)
    if largest > LARGEST_GATE:
        raise ValueError(
            f"g: expected log decays of at most 0, got {float(largest):g};"
            " of a linear decay alpha it is g = log(alpha)"
        )


def _check_slots(problem: Problem, idle: np.ndarray | None = None) -> None:
    """Check indices of slots where they lie on the host.

    Slots may be read by several sequences, if others are written. `idle` masks sequences that are
    known to write nothing.
    """
    read, written, slots = problem.state_indices, problem.output_state_indices, problem.pool_slots
    name, targets = "state_indices", read
    for one, indices in (("state_indices", read), ("output_state_indices", written)):
        if isinstance(indices, np.ndarray) and np.any(indices >= slots):
            raise ValueError(
                f"{one}: expected indices below slots = {slots} (negative: padding),"
                f" got {int(indices.max())}"
            )
    if written is not None:
        name, targets = "output_state_indices", written
    if not isinstance(targets, np.ndarray):
        return
    if idle is not None:
        targets = np.where(idle, -1, targets)
    used, counts = np.unique(targets[targets >= 0], return_counts=True)
    if np.any(counts > 1):
        raise ValueError(
            f"{name}: expected each slot at most once, got slot {used[counts > 1][0]} repeatedly"
        )
    read = np.arange(len(targets)) if read is None else read
    if not isinstance(read, np.ndarray):
        return
    foreign = np.isin(read, used) & (read != targets)
    if isinstance(problem.fresh, np.ndarray):
        foreign &= ~problem.fresh
    if foreign.any():
        raise ValueError(
            f"{name}: expected no slot that another sequence reads, got slot {read[foreign][0]}"
        )


# What a call reads, by the names that callers know it by.
_PLAIN = ("q", "k", "v", "beta", "g", "initial_state", "cu_seqlens", "accepted", *ON_POOL)
_RAW = {"logits": "beta.logits", "a": "g.a", "A_log": "g.A_log", "dt_bias": "g.dt_bias"}
_READ = {name: name for name in _PLAIN} | _RAW


def check_written(problem: Problem, name: str) -> None:
    """Check that "out" or "state" can be written whole without touching what is read."""
    x = getattr(problem, name)
    flags = x.flags
    if name != "state" and not flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array, got strides {x.strides}")
    may_share: Callable[[Any, Any], bool] = shares_memory
    if isinstance(x, np.ndarray):
        may_share = np.may_share_memory  # by where they begin and end, in a third of the time
        if not flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
    beside = problem.kept.get(name)
    if beside is None:
        beside = problem.kept[name] = _read_beside(problem, name)
    known = vars(problem)
    for other, shown in beside:
        y = known[other]
        if may_share(x, y) and shares_memory(x, y):
            raise ValueError(f"{name}: expected no memory in common with {shown}")


def _read_beside(problem: Problem, name: str) -> list[tuple[str, str]]:
    """Return which arrays are read that "out" or "state" may share memory with, in all calls alike.

    On the host, what is written must be of native byte order.
    """
    x, given = getattr(problem, name), vars(problem)
    on_host = isinstance(x, np.ndarray)
    if on_host and not x.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {x.dtype.str}")
    return [
        (other, shown)
        for other, shown in _READ.items()
        if other != name
        and given[other] is not None
        and isinstance(given[other], np.ndarray) == on_host
    ]
