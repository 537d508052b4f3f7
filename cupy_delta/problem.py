"""Problem: one call, checked. Every check of every argument lives here and in checker.py.

What goes by the looks of arrays and by options is checked once for all calls that are alike in
them: the functions that are `remembered` are given no array. Values and memory are checked in
every call.

Symbols: B batch, T time, N sequences, H key heads, HV value heads, K and V key and value
dimensions, C chunk. Shapes are written as strings of symbols, e.g. ``"B T H K"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arrays import FLOAT_DTYPES, describe, dtype_name, looks, sharing
from .checker import POOL_DTYPES, Checker, chunk_size_of, options_of, remembered, scale_of

MAX_STEP_TOKENS = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A checked call: arrays (None where absent), dimensions and options.

    `dtype` is that of q, k, v; `compute_dtype` is what the arithmetic runs in and
    `state_dtype` that of states on this problem. With `cu_seqlens`, B = 1 and N = len - 1.
    `kept` holds what was derived from all this but from no value of an array, plans for example.
    All calls that are alike share it, so no array may go into it.
    """

    kind: str
    dtype: np.dtype
    B: int
    T: int
    N: int
    H: int
    HV: int
    K: int
    V: int
    q: Any = None
    k: Any = None
    v: Any = None
    beta: Any = None
    g: Any = None
    initial_state: Any = None
    cu_seqlens: Any = None
    out: Any = None
    w: Any = None
    u: Any = None
    v_new: Any = None
    states: Any = None
    state: Any = None
    state_indices: Any = None
    scale: float = 1.0
    qk_l2norm: bool = False
    chunk_size: int | None = None
    state_layout: str = "kv"
    kept: dict = field(default_factory=dict, init=False, repr=False)

    def of(self, arrays: dict) -> Problem:
        """Return this problem with arrays, which must look as those that were checked."""
        problem = object.__new__(Problem)
        object.__setattr__(problem, "__dict__", vars(self) | arrays)
        return problem

    @property
    def groups(self) -> int:
        """Value heads per key head."""
        return self.HV // self.H

    @property
    def gate(self) -> str | None:
        """None, "scalar" (B, T, HV) or "channel" (B, T, HV, K)."""
        return None if self.g is None else ("scalar" if self.g.ndim == 3 else "channel")

    @property
    def beta_per_value(self) -> bool:
        """Whether beta is (B, T, HV, V)."""
        return self.beta is not None and self.beta.ndim == 4

    @property
    def compute_dtype(self) -> np.dtype:
        return FLOAT_DTYPES["float64" if dtype_name(self.dtype) == "float64" else "float32"]

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
        if self.cu_seqlens is None:
            return -(-self.T // chunk)
        return self.T // chunk + self.N

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
) -> Problem:
    """Check a call of an operator over whole sequences."""
    found = looks(q, k, v, beta, g, initial_state, cu_seqlens, out)
    alike = _operator(found, beta_shapes, scale, qk_l2norm, state_layout, chunk_size)
    arrays = dict(
        q=q, k=k, v=v, beta=beta, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens, out=out
    )
    problem = _with_ends(alike.of(arrays))
    if out is not None:
        _check_written(problem, "out")
    return problem


@remembered
def _operator(found, beta_shapes, scale, qk_l2norm, state_layout, chunk_size) -> Problem:
    q, k, v, beta, g, initial_state, cu_seqlens, out = found
    check = Checker("q", q)
    check.q_k_v_beta_g(q, k, v, beta, g, beta_shapes)
    check.sequences(cu_seqlens)
    options = options_of(check, scale, qk_l2norm, state_layout)
    symbols = options.pop("symbols")
    if initial_state is not None:
        check.array("initial_state", initial_state, symbols, (check.state_dtype,))
    check.output(out)
    return _problem(check, **options, chunk_size=chunk_size_of(chunk_size))


def step_problem(
    q, k, v, beta, g, *, state, state_indices, scale, qk_l2norm, state_layout, out
) -> Problem:
    """Check a decoding step."""
    found = looks(q, k, v, beta, g, state, state_indices, out)
    alike = _step(found, scale, qk_l2norm, state_layout)
    problem = alike.of(
        dict(q=q, k=k, v=v, beta=beta, g=g, state=state, state_indices=state_indices, out=out)
    )
    if state_indices is not None:
        _check_slots(state_indices, state.shape[0])
    _check_written(problem, "state")
    if out is not None:
        _check_written(problem, "out")
    return problem


@remembered
def _step(found, scale, qk_l2norm, state_layout) -> Problem:
    q, k, v, beta, g, state, state_indices, out = found
    check = Checker("q", q)
    check.q_k_v_beta_g(q, k, v, beta, g)
    T = check.sizes["T"]
    if T > MAX_STEP_TOKENS:
        raise ValueError(
            f"q: expected T of at most {MAX_STEP_TOKENS} new tokens, got T = {T};"
            " chunk_delta_rule takes any number"
        )
    check.sequences(None)
    options = options_of(check, scale, qk_l2norm, state_layout)
    pool = options.pop("symbols").replace("N", "slots")
    pool_dtypes = (np.float64,) if check.dtype.name == "float64" else POOL_DTYPES
    check.array("state", state, pool, pool_dtypes)
    slots, B = check.sizes["slots"], check.sizes["B"]
    if state_indices is not None:
        check.integers("state_indices", state_indices)
        if state_indices.shape != (B,):
            raise ValueError(
                f"state_indices: expected (B,) = ({B},) like q, got {state_indices.shape}"
            )
    elif slots != B:
        raise ValueError(
            f"state: expected one slot per sequence, slots = B = {B}, or state_indices,"
            f" got slots = {slots}"
        )
    check.output(out)
    return _problem(check, **options)


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


def factors_problem(k, v, beta, *, cu_seqlens, chunk_size=None) -> Problem:
    """Check a call of `wy_factors` or `sequence_transfer`."""
    alike = _factors(looks(k, v, beta, cu_seqlens), chunk_size)
    return _with_ends(alike.of(dict(k=k, v=v, beta=beta, cu_seqlens=cu_seqlens)))


@remembered
def _factors(found, chunk_size) -> Problem:
    k, v, beta, cu_seqlens = found
    check = Checker("k", k)
    check.q_k_v_beta_g(None, k, v, beta, None)
    check.sequences(cu_seqlens)
    return _problem(check, chunk_size=chunk_size_of(chunk_size))


def state_pass_problem(k, w, u, *, initial_state, cu_seqlens, chunk_size) -> Problem:
    """Check a call of `state_pass`."""
    alike = _state_pass(looks(k, w, u, initial_state, cu_seqlens), chunk_size)
    arrays = dict(k=k, w=w, u=u, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return _with_ends(alike.of(arrays))


@remembered
def _state_pass(found, chunk_size) -> Problem:
    k, w, u, initial_state, cu_seqlens = found
    check = Checker("k", k)
    check.array("k", k, "B T H K", (check.dtype,))
    check.array("w", w, "B T HV K", (check.dtype,))
    check.array("u", u, "B T HV V", (check.dtype,))
    check.sequences(cu_seqlens)
    if initial_state is not None:
        check.array("initial_state", initial_state, "N HV K V", (check.state_dtype,))
    return _problem(check, chunk_size=chunk_size_of(chunk_size))


def chunk_output_problem(q, k, v_new, states, *, scale, cu_seqlens, chunk_size) -> Problem:
    """Check a call of `chunk_output`; the backend checks the chunk axis of `states`."""
    alike = _chunk_output(looks(q, k, v_new, states, cu_seqlens), scale, chunk_size)
    arrays = dict(q=q, k=k, v_new=v_new, states=states, cu_seqlens=cu_seqlens)
    return _with_ends(alike.of(arrays))


@remembered
def _chunk_output(found, scale, chunk_size) -> Problem:
    q, k, v_new, states, cu_seqlens = found
    check = Checker("q", q)
    check.array("q", q, "B T H K", (check.dtype,))
    check.array("k", k, "B T H K", (check.dtype,))
    check.array("v_new", v_new, "B T HV V", (check.dtype,))
    check.sequences(cu_seqlens)
    check.array("states", states, "B chunks HV K V", (check.state_dtype,))
    scale = scale_of(scale, check.sizes["K"])
    return _problem(check, scale=scale, chunk_size=chunk_size_of(chunk_size))


def check_chunk_axis(problem: Problem, chunk: int) -> None:
    """Check the chunk axis of `states` once the chunk size is settled."""
    slots = problem.chunk_slots(chunk)
    if problem.states.shape[1] != slots:
        raise ValueError(
            f"states: expected {slots} chunks of chunk_size = {chunk} along axis 1,"
            f" got shape {tuple(problem.states.shape)}"
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
    sizes: dict[str, Any] = {s: check.sizes.get(s, 0) for s in ("B", "T", "N", "H", "HV", "K", "V")}
    return Problem(kind=check.kind, dtype=check.dtype, **sizes, **options)


# ---- values and memory, in every call ------------------------------------------------------------


def _with_ends(problem: Problem) -> Problem:
    """Check the values of `cu_seqlens` where they lie on the host; others are never read."""
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


def _check_slots(indices, slots: int) -> None:
    """Check the values of `state_indices` where they lie on the host."""
    if not isinstance(indices, np.ndarray):
        return
    if np.any(indices >= slots):
        raise ValueError(
            f"state_indices: expected indices below slots = {slots} (negative: padding),"
            f" got {int(indices.max())}"
        )
    used, counts = np.unique(indices[indices >= 0], return_counts=True)
    if np.any(counts > 1):
        raise ValueError(
            "state_indices: expected each slot at most once,"
            f" got slot {used[counts > 1][0]} repeatedly"
        )


_READ = ("q", "k", "v", "beta", "g", "initial_state", "cu_seqlens", "state_indices", "state")


def _check_written(problem: Problem, name: str) -> None:
    """Check that "out" or "state" can be written whole without touching what is read."""
    x, on_host = getattr(problem, name), problem.kind == "numpy"
    if not x.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array, got strides {x.strides}")
    if on_host and not x.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if on_host and not x.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {x.dtype.str}")
    shared = sharing(problem.kind)
    for other in _READ:
        y = getattr(problem, other)
        if y is None or other == name or isinstance(y, np.ndarray) != on_host:
            continue
        if shared(x, y):
            raise ValueError(f"{name}: expected no memory in common with {other}")
