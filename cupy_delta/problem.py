"""Problem: one call, checked once. Every check of every argument lives in this file.

Symbols: B batch, T time, N sequences, H key heads, HV value heads, K and V key and value
dimensions, C chunk. Shapes are written as strings of symbols, e.g. ``"B T H K"``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from .arrays import FLOAT_DTYPES, describe, dtype_name, kind_of, overlaps

MAX_STEP_TOKENS = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A checked call: arrays (None where absent), dimensions and options.

    `dtype` is that of q, k, v; `compute_dtype` is what the arithmetic runs in and
    `state_dtype` that of states on this problem. With `cu_seqlens`, B = 1 and N = len - 1.
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


@cache
def _symbols(shapes: str | tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(s.split()) for s in ((shapes,) if isinstance(shapes, str) else shapes))


class _Checker:
    """Checks arrays one after the other; the first use of a symbol fixes its value."""

    def __init__(self, first_name: str, first):
        self.kind = kind_of(first)
        if self.kind is None:
            raise TypeError(f"{first_name}: expected a NumPy or CuPy array, got {describe(first)}")
        self.first_name = first_name
        self.device = getattr(first, "device", None)
        self.sizes: dict[str, int] = {}
        self.source: dict[str, str] = {}
        name = dtype_name(first.dtype)
        if name not in FLOAT_DTYPES:
            raise TypeError(f"{first_name}: expected dtype {_one_of(FLOAT_DTYPES)}, got {name}")
        self.dtype = FLOAT_DTYPES[name]
        self.state_dtype = FLOAT_DTYPES["float64" if name == "float64" else "float32"]

    def array(self, name: str, x, shapes: str | tuple[str, ...], dtypes: tuple) -> None:
        """Check kind, device, dtype, rank and shape of one array."""
        self.same_kind(name, x)
        if all(dtype_name(x.dtype) != dtype_name(np.dtype(d)) for d in dtypes):
            names = [np.dtype(d).name for d in dtypes]
            like = f" like {self.first_name}" if dtypes == (self.dtype,) else ""
            raise TypeError(f"{name}: expected dtype {_one_of(names)}{like}, got {x.dtype.name}")
        self.shape(name, x, shapes)

    def same_kind(self, name: str, x) -> None:
        kind = kind_of(x)
        if kind is None:
            raise TypeError(f"{name}: expected a NumPy or CuPy array, got {describe(x)}")
        if kind != self.kind:
            raise TypeError(
                f"{name}: expected a {self.kind} array like {self.first_name}, got {describe(x)};"
                " NumPy and CuPy arrays do not mix in one call"
            )
        if kind == "cupy" and x.device != self.device:
            raise ValueError(
                f"{name}: expected an array on device {self.device.id} like {self.first_name},"
                f" got one on device {x.device.id}"
            )

    def shape(self, name: str, x, shapes: str | tuple[str, ...]) -> None:
        alternatives = _symbols(shapes)
        symbols = next((s for s in alternatives if len(s) == x.ndim), None)
        if symbols is None:
            wanted = " or ".join(f"({', '.join(s)})" for s in alternatives)
            raise ValueError(
                f"{name}: expected {wanted}, {_one_of([str(len(s)) for s in alternatives])}"
                f" dimensions, got shape {tuple(x.shape)}"
            )
        for symbol, size in zip(symbols, x.shape, strict=True):
            if self.sizes.get(symbol, size) != size:
                wanted = ", ".join(str(self.sizes.get(s, s)) for s in symbols)
                raise ValueError(
                    f"{name}: expected ({', '.join(symbols)}) = ({wanted}) like"
                    f" {self.source[symbol]}, got {tuple(x.shape)}{self.swapped(symbols, x.shape)}"
                )
        for symbol, size in zip(symbols, x.shape, strict=True):
            if symbol not in self.sizes:
                self.fix(symbol, size, name)

    def swapped(self, symbols: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Say so when a state of the wrong shape would fit in the other layout."""
        turned = (*shape[:-2], shape[-1], shape[-2])
        fits = all(self.sizes.get(s, n) == n for s, n in zip(symbols, turned, strict=True))
        is_state = sorted(symbols[-2:]) == ["K", "V"]
        return ": its last two axes are swapped" if is_state and fits else ""

    def fix(self, symbol: str, size: int, source: str) -> None:
        if symbol in ("H", "HV", "K", "V") and size < 1:
            raise ValueError(f"{source}: expected {symbol} of at least 1, got {symbol} = {size}")
        if symbol == "HV" and size % self.sizes.get("H", 1):
            raise ValueError(
                f"{source}: expected HV to be a multiple of H = {self.sizes['H']}, since value head"
                f" hv uses key head hv // (HV / H), got HV = {size}"
            )
        self.sizes[symbol] = size
        self.source[symbol] = source

    def sequences(self, cu_seqlens) -> None:
        """Check `cu_seqlens` and fix N. Values are read only when they lie on the host."""
        if cu_seqlens is None:
            self.fix("N", self.sizes["B"], self.source["B"])
            return
        name = "cu_seqlens"
        kind = kind_of(cu_seqlens)
        if kind is None:
            raise TypeError(f"{name}: expected an integer array, got {describe(cu_seqlens)}")
        if kind == "cupy":
            self.same_kind(name, cu_seqlens)
        if cu_seqlens.dtype.name not in ("int32", "int64"):
            raise TypeError(f"{name}: expected dtype int32 or int64, got {cu_seqlens.dtype.name}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"{name}: expected shape (N + 1,) with N >= 0, got {tuple(cu_seqlens.shape)}"
            )
        if self.sizes["B"] != 1:
            raise ValueError(
                f"{name}: expected B = 1, since sequences then lie end to end along T,"
                f" got B = {self.sizes['B']}"
            )
        T = self.sizes["T"]
        if kind == "cupy" and cu_seqlens.shape[0] == 1 and T:
            # The one thing that is known of values in device memory.
            raise ValueError(
                f"{name}: expected at least one sequence for T = {T}, got shape (1,), N = 0"
            )
        if kind == "numpy":
            # Compared, not subtracted: a difference of integers may wrap round.
            falls = np.any(cu_seqlens[1:] < cu_seqlens[:-1])
            if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or falls:
                raise ValueError(
                    f"{name}: expected nondecreasing values from 0 to T = {T},"
                    f" got {np.array2string(cu_seqlens, threshold=8)}"
                )
        self.fix("N", cu_seqlens.shape[0] - 1, name)

    def q_k_v_beta_g(self, q, k, v, beta, g, beta_shapes=("B T HV",)) -> None:
        if q is not None:
            self.array("q", q, "B T H K", (self.dtype,))
        self.array("k", k, "B T H K", (self.dtype,))
        self.array("v", v, "B T HV V", (self.dtype,))
        self.array("beta", beta, beta_shapes, (self.dtype, np.float32))
        if g is not None:
            self.array("g", g, ("B T HV", "B T HV K"), (self.dtype, np.float32))

    def output(self, out, inputs: dict) -> None:
        if out is None:
            return
        self.array("out", out, "B T HV V", (self.dtype,))
        self.writable("out", out, inputs)

    def writable(self, name: str, x, inputs: dict) -> None:
        """Check that `x` can be written whole without touching an input."""
        if not x.flags.c_contiguous:
            raise ValueError(f"{name}: expected a C-contiguous array, got strides {x.strides}")
        if self.kind == "numpy" and not x.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        if self.kind == "numpy" and not x.dtype.isnative:
            raise TypeError(f"{name}: expected native byte order, got dtype {x.dtype.str}")
        for other, array in inputs.items():
            if kind_of(array) == self.kind and overlaps(x, array):
                raise ValueError(f"{name}: expected no memory in common with {other}")

    def problem(self, **fields) -> Problem:
        sizes = {s: self.sizes.get(s, 0) for s in ("B", "T", "N", "H", "HV", "K", "V")}
        return Problem(kind=self.kind, dtype=self.dtype, **sizes, **fields)


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
    check = _Checker("q", q)
    check.q_k_v_beta_g(q, k, v, beta, g, beta_shapes)
    check.sequences(cu_seqlens)
    options = _options(check, scale, qk_l2norm, state_layout)
    if initial_state is not None:
        check.array("initial_state", initial_state, options["symbols"], (check.state_dtype,))
    arrays = dict(q=q, k=k, v=v, beta=beta, g=g, initial_state=initial_state)
    check.output(out, arrays | {"cu_seqlens": cu_seqlens})
    del options["symbols"]
    return check.problem(
        **arrays, **options, cu_seqlens=cu_seqlens, out=out, chunk_size=_chunk_size(chunk_size)
    )


def step_problem(
    q, k, v, beta, g, *, state, state_indices, scale, qk_l2norm, state_layout, out
) -> Problem:
    """Check a decoding step."""
    check = _Checker("q", q)
    check.q_k_v_beta_g(q, k, v, beta, g)
    T = check.sizes["T"]
    if T > MAX_STEP_TOKENS:
        raise ValueError(
            f"q: expected T of at most {MAX_STEP_TOKENS} new tokens, got T = {T};"
            " chunk_delta_rule takes any number"
        )
    check.sequences(None)
    options = _options(check, scale, qk_l2norm, state_layout)
    pool = options.pop("symbols").replace("N", "slots")
    pool_dtypes = (np.float64,) if check.dtype.name == "float64" else _POOL_DTYPES
    check.array("state", state, pool, pool_dtypes)
    slots, B = check.sizes["slots"], check.sizes["B"]
    if state_indices is None:
        if slots != B:
            raise ValueError(
                f"state: expected one slot per sequence, slots = B = {B}, or state_indices,"
                f" got slots = {slots}"
            )
    else:
        _check_indices(check, state_indices, slots)
    arrays = dict(q=q, k=k, v=v, beta=beta, g=g)
    inputs = arrays | {"state_indices": state_indices}
    check.writable("state", state, inputs)
    check.output(out, inputs | {"state": state})
    return check.problem(**arrays, **options, state=state, state_indices=state_indices, out=out)


def backward_arrays(problem: Problem, do, dfinal_state) -> None:
    """Check the gradients that enter the backward against the forward's problem."""
    check = _Checker("v", problem.v)
    for symbol in ("B", "T", "N", "HV", "K", "V"):
        check.sizes[symbol], check.source[symbol] = getattr(problem, symbol), "the forward"
    check.array("do", do, "B T HV V", (check.dtype,))
    if dfinal_state is not None:
        check.array("dfinal_state", dfinal_state, problem.state_symbols, (check.state_dtype,))


def factors_problem(k, v, beta, *, cu_seqlens, chunk_size=None) -> Problem:
    """Check a call of `wy_factors` or `sequence_transfer`."""
    check = _Checker("k", k)
    check.q_k_v_beta_g(None, k, v, beta, None)
    check.sequences(cu_seqlens)
    return check.problem(
        k=k, v=v, beta=beta, cu_seqlens=cu_seqlens, chunk_size=_chunk_size(chunk_size)
    )


def state_pass_problem(k, w, u, *, initial_state, cu_seqlens, chunk_size) -> Problem:
    """Check a call of `state_pass`."""
    check = _Checker("k", k)
    check.array("k", k, "B T H K", (check.dtype,))
    check.array("w", w, "B T HV K", (check.dtype,))
    check.array("u", u, "B T HV V", (check.dtype,))
    check.sequences(cu_seqlens)
    if initial_state is not None:
        check.array("initial_state", initial_state, "N HV K V", (check.state_dtype,))
    return check.problem(
        k=k,
        w=w,
        u=u,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_size=_chunk_size(chunk_size),
    )


def chunk_output_problem(q, k, v_new, states, *, scale, cu_seqlens, chunk_size) -> Problem:
    """Check a call of `chunk_output`; the backend checks the chunk axis of `states`."""
    check = _Checker("q", q)
    check.array("q", q, "B T H K", (check.dtype,))
    check.array("k", k, "B T H K", (check.dtype,))
    check.array("v_new", v_new, "B T HV V", (check.dtype,))
    check.sequences(cu_seqlens)
    check.array("states", states, "B chunks HV K V", (check.state_dtype,))
    return check.problem(
        q=q,
        k=k,
        v_new=v_new,
        states=states,
        scale=_scale(scale, check.sizes["K"]),
        cu_seqlens=cu_seqlens,
        chunk_size=_chunk_size(chunk_size),
    )


def check_chunk_axis(problem: Problem, chunk: int) -> None:
    """Check the chunk axis of `states` once the chunk size is settled."""
    slots = problem.chunk_slots(chunk)
    if problem.states.shape[1] != slots:
        raise ValueError(
            f"states: expected {slots} chunks of chunk_size = {chunk} along axis 1,"
            f" got shape {tuple(problem.states.shape)}"
        )


_POOL_DTYPES = tuple(d for name, d in FLOAT_DTYPES.items() if name != "float64")


def instance(name: str, x, cls: type, wanted: str) -> None:
    """Check that an argument is one of the library's own objects."""
    if not isinstance(x, cls):
        raise TypeError(f"{name}: expected {wanted}, got {describe(x)}")


def affine_arrays(p, h, operands: dict) -> None:
    """Check a transfer's own arrays and what meets them.

    `operands` maps a name to an array of the shape of `h`, or of that of `p` when the name ends
    in ``.p``.
    """
    check = _Checker("h", h)
    check.array("h", h, "N HV K V", (check.dtype,))
    check.array("p", p, "N HV K K", (check.dtype,))
    for name, x in operands.items():
        check.array(name, x, "N HV K K" if name.endswith(".p") else "N HV K V", (check.dtype,))


def _one_of(names) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _options(check: _Checker, scale, qk_l2norm, state_layout) -> dict:
    if not isinstance(state_layout, str):
        raise TypeError(f'state_layout: expected "kv" or "vk", got {describe(state_layout)}')
    if state_layout not in ("kv", "vk"):
        raise ValueError(f'state_layout: expected "kv" or "vk", got {state_layout!r}')
    if not isinstance(qk_l2norm, bool | np.bool_):
        raise TypeError(f"qk_l2norm: expected True or False, got {describe(qk_l2norm)}")
    return dict(
        scale=_scale(scale, check.sizes["K"]),
        qk_l2norm=bool(qk_l2norm),
        state_layout=state_layout,
        symbols="N HV K V" if state_layout == "kv" else "N HV V K",
    )


def _scale(scale, K: int) -> float:
    if scale is None:
        return K**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale: expected a number or None (K ** -0.5), got {describe(scale)}")
    try:
        number = float(scale)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"scale: expected a finite number, got {number}")
    return number


def _chunk_size(chunk_size) -> int | None:
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral):
        raise TypeError(f"chunk_size: expected an integer or None, got {describe(chunk_size)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    return int(chunk_size)


def _check_indices(check: _Checker, indices, slots: int) -> None:
    name, B = "state_indices", check.sizes["B"]
    kind = kind_of(indices)
    if kind is None:
        raise TypeError(f"{name}: expected an integer array, got {describe(indices)}")
    if kind == "cupy":
        check.same_kind(name, indices)
    if indices.dtype.name not in ("int32", "int64"):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {indices.dtype.name}")
    if indices.shape != (B,):
        raise ValueError(f"{name}: expected (B,) = ({B},) like q, got {tuple(indices.shape)}")
    if kind == "cupy":
        return
    if np.any(indices >= slots):
        raise ValueError(
            f"{name}: expected indices below slots = {slots} (negative: padding),"
            f" got {int(indices.max())}"
        )
    used, counts = np.unique(indices[indices >= 0], return_counts=True)
    if np.any(counts > 1):
        raise ValueError(
            f"{name}: expected each slot at most once, got slot {used[counts > 1][0]} repeatedly"
        )
