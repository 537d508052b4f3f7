"""The checks that go by what arrays look like and by options; none of them is given an array.

Symbols as in problem.py; shapes are written as strings of symbols, e.g. ``"B T H K"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from .arrays import FLOAT_DTYPES, AnyLook, Look, RawLook, describe, dtype_name
from .call import POOL_ALIGNMENT
from .raw import BETAS, GATES, Bias, RawBeta, RawGate

KEPT_CALLS, KEPT_PLACES = 256, 4096
GATE_SHAPES = "B T HV", "B T HV K"
POOL_DTYPES = tuple(d for name, d in FLOAT_DTYPES.items() if name != "float64")


def remembered(check):
    """Keep the results of the last calls of a check that is given looks and options, no array.

    Its errors are not kept. Options of different types are different calls: True is no 1.
    """
    kept = lru_cache(KEPT_CALLS, typed=True)(check)

    @wraps(check)
    def recall(*arguments, **options):
        try:
            return kept(*arguments, **options)
        except TypeError:
            pass  # from the check, or of an option that has no hash: it has the better message
        return check(*arguments, **options)

    return recall


class Passed:
    """A call that has passed every check: its problem, without arrays but with this.

    `again` is what the backend may keep of it: a launch on the same memory. `missed` counts the
    times that it was found by memory and not by arrays (repeated.py).
    """

    __slots__ = ("again", "missed", "problem")

    def __init__(self, problem):
        self.problem = problem.of({"passed": self})
        self.again: Callable[[], None] | None = None
        self.missed = 0


class PassedCalls:
    """Calls that passed every check, of those whose arrays all lie on a device.

    Kept by where the arrays lie, since nothing else of them is looked at there.
    """

    def __init__(self):
        self._kept: dict = {}

    def find(self, key) -> Passed | None:
        try:
            return self._kept.get(key)
        except TypeError:  # an option that has no hash: it is refused
            return None

    def keep(self, key, problem) -> Passed:
        if len(self._kept) >= KEPT_PLACES:
            self._kept.clear()
        self._kept[key] = passed = Passed(problem)
        return passed


@cache
def _symbols(shapes: str | tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(s.split()) for s in ((shapes,) if isinstance(shapes, str) else shapes))


class Checker:
    """Checks looks of arrays one after the other; the first use of a symbol fixes its value."""

    def __init__(self, first_name: str, first: AnyLook):
        if not isinstance(first, Look):
            raise TypeError(f"{first_name}: expected a NumPy or CuPy array, got {_found(first)}")
        self.kind, self.device = first.kind, first.device
        self.first_name = first_name
        self.sizes: dict[str, int] = {}
        self.source: dict[str, str] = {}
        self.axes: dict[str, tuple[str, ...]] = {}  # symbols of each array that was checked
        self.narrow_gate = False
        self.raw_gate: RawGate | None = None
        self.raw_beta: RawBeta | None = None
        name = dtype_name(first.dtype)
        if name not in FLOAT_DTYPES:
            raise TypeError(f"{first_name}: expected dtype {_one_of(FLOAT_DTYPES)}, got {name}")
        self.dtype = FLOAT_DTYPES[name]
        self.state_dtype = FLOAT_DTYPES["float64" if name == "float64" else "float32"]
        # Of states that are given.
        self.state_dtypes = (self.state_dtype,) if name == "float64" else POOL_DTYPES

    def array(self, name: str, x: AnyLook, shapes: str | tuple[str, ...], dtypes: tuple) -> None:
        """Check kind, device, dtype, rank and shape of one array."""
        x = self.same_kind(name, x)
        if all(dtype_name(x.dtype) != dtype_name(np.dtype(d)) for d in dtypes):
            names = [np.dtype(d).name for d in dtypes]
            like = f" like {self.first_name}" if dtypes == (self.dtype,) else ""
            raise TypeError(f"{name}: expected dtype {_one_of(names)}{like}, got {x.dtype.name}")
        self.shape(name, x.shape, shapes)

    def same_kind(self, name: str, x: AnyLook) -> Look:
        """Return the look of an array that may be in one call with the first."""
        if not isinstance(x, Look):
            raise TypeError(f"{name}: expected a NumPy or CuPy array, got {_found(x)}")
        if x.kind != self.kind:
            raise TypeError(
                f"{name}: expected a {self.kind} array like {self.first_name},"
                f" got {x.kind}.ndarray; NumPy and CuPy arrays do not mix in one call"
            )
        if x.device != self.device:
            raise ValueError(
                f"{name}: expected an array on device {self.device} like {self.first_name},"
                f" got one on device {x.device}"
            )
        return x

    def integers(self, name: str, x: AnyLook) -> None:
        """Check an array of integers, which may lie on the host whatever the kind of the others."""
        if not isinstance(x, Look):
            raise TypeError(f"{name}: expected an integer array, got {_found(x)}")
        if x.kind == "cupy":
            self.same_kind(name, x)
        if x.dtype.name not in ("int32", "int64"):
            raise TypeError(f"{name}: expected dtype int32 or int64, got {x.dtype.name}")

    def mask(self, name: str, x: Look | type | None, symbol: str) -> None:
        """Check a mask of sequences, which may lie on the host whatever the kind of the others."""
        if not isinstance(x, Look):
            raise TypeError(f"{name}: expected an array of bool, got {_found(x)}")
        if x.kind == "cupy":
            self.same_kind(name, x)
        if x.dtype.name != "bool":
            raise TypeError(f"{name}: expected dtype bool, got {x.dtype.name}")
        self.per_sequence(name, x, symbol)

    def per_sequence(self, name: str, x: Look, symbol: str) -> None:
        """Check that there is one element for each of the sequences counted by a symbol."""
        count = self.sizes[symbol]
        if x.shape != (count,):
            raise ValueError(
                f"{name}: expected ({symbol},) = ({count},) like {self.source[symbol]},"
                f" got {x.shape}"
            )

    def shape(self, name: str, shape: tuple[int, ...], shapes: str | tuple[str, ...]) -> None:
        alternatives = _symbols(shapes)
        symbols = next((s for s in alternatives if len(s) == len(shape)), None)
        if symbols is None:
            wanted = " or ".join(_shown(s) for s in alternatives)
            ranks = _one_of([str(len(s)) for s in alternatives])
            raise ValueError(
                f"{name}: expected {wanted}, {ranks} dimension{'s' * (ranks != '1')},"
                f" got shape {shape}"
            )
        for symbol, size in zip(symbols, shape, strict=True):
            if self.sizes.get(symbol, size) != size:
                wanted = _shown([str(self.sizes.get(s, s)) for s in symbols])
                raise ValueError(
                    f"{name}: expected {_shown(symbols)} = {wanted} like"
                    f" {self.source[symbol]}, got {shape}{self.swapped(symbols, shape)}"
                )
        self.axes[name] = symbols
        for symbol, size in zip(symbols, shape, strict=True):
            if symbol not in self.sizes:
                self.fix(symbol, size, name)

    def swapped(self, symbols: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Say so when a state of the wrong shape would fit in the other layout."""
        if sorted(symbols[-2:]) != ["K", "V"]:
            return ""
        turned = (*shape[:-2], shape[-1], shape[-2])
        fits = all(self.sizes.get(s, n) == n for s, n in zip(symbols, turned, strict=True))
        return ": its last two axes are swapped" if fits else ""

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

    def sequences(self, cu_seqlens: Look | None) -> None:
        """Check `cu_seqlens` and fix N."""
        if cu_seqlens is None:
            self.fix("N", self.sizes["B"], self.source["B"])
            return
        name = "cu_seqlens"
        self.integers(name, cu_seqlens)
        shape = cu_seqlens.shape
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"{name}: expected shape (N + 1,) with N >= 0, got {shape}")
        if self.sizes["B"] != 1:
            raise ValueError(
                f"{name}: expected B = 1, since sequences then lie end to end along T,"
                f" got B = {self.sizes['B']}"
            )
        T = self.sizes["T"]
        if cu_seqlens.kind == "cupy" and shape[0] == 1 and T:
            # The one thing that is known of values in device memory.
            raise ValueError(
                f"{name}: expected at least one sequence for T = {T}, got shape (1,), N = 0"
            )
        self.fix("N", shape[0] - 1, name)
        self.axes[name] = ("N + 1",)

    def q_k_v_beta_g(self, q, k, v, beta, g, beta_shapes=("B T HV",)) -> None:
        if q is not None:
            self.array("q", q, "B T H K", (self.dtype,))
        self.array("k", k, "B T H K", (self.dtype,))
        self.array("v", v, "B T HV V", (self.dtype,))
        self.beta(beta, beta_shapes)
        self.gate(g)

    def beta(self, beta: AnyLook, shapes: tuple[str, ...]) -> None:
        """Check beta, or the logits of a `SigmoidBeta`."""
        if isinstance(beta, RawLook) and beta.cls in BETAS:
            self.parameter("beta.logits", beta.arrays[0], shapes)
            self.axes["beta"] = self.axes["beta.logits"]
            self.raw_beta = RawBeta(_float_dtype(beta.arrays[0]), beta.number)
        else:
            self.parameter("beta", beta, shapes)

    def gate(self, g: AnyLook) -> None:
        """Check g, or the logits and parameters of a `SoftplusGate` or `SigmoidGate`."""
        if isinstance(g, RawLook) and g.cls in GATES:
            a, A_log, dt_bias = g.arrays
            self.parameter("g.a", a, GATE_SHAPES)
            self.axes["g"] = self.axes["g.a"]
            self.parameter("g.A_log", A_log, "HV")
            bias: Bias | None = None
            if dt_bias is not None:
                per_channel = len(self.axes["g"]) == 4
                self.parameter("g.dt_bias", dt_bias, ("HV", "HV K") if per_channel else "HV")
                bias = "head" if len(self.axes["g.dt_bias"]) == 1 else "channel"
            self.raw_gate = RawGate(g.cls.formula, _float_dtype(a), bias, g.number)
        elif g is not None:
            self.parameter("g", g, GATE_SHAPES)
            self.narrow_gate = len(self.axes["g"]) == 4 and _float_dtype(g).itemsize == 2

    def parameter(self, name: str, x: AnyLook, shapes: str | tuple[str, ...]) -> None:
        """Check an array that may also be float32."""
        self.array(name, x, shapes, (self.dtype, np.float32))

    def output(self, out: Look | None) -> None:
        if out is not None:
            self.array("out", out, "B T HV V", (self.dtype,))


class PoolLook(NamedTuple):
    """How a pool lies in memory: strides in bytes, and its address modulo `POOL_ALIGNMENT`."""

    strides: tuple[int, ...]
    offset: int = 0


def pool_look(state: Any) -> PoolLook | None:
    """Describe how a pool lies in memory; None for what is no array and will be refused."""
    if isinstance(state, np.ndarray):
        return tuple.__new__(PoolLook, (state.strides, 0))  # in half the time of its constructor
    strides = getattr(state, "strides", None)
    if strides is None:
        return None
    on_host = isinstance(state, np.generic)
    return PoolLook(strides, 0 if on_host else state.data.ptr % POOL_ALIGNMENT)


def pool_of(
    check: Checker, symbols: str, state: Look, lies: PoolLook | None, sequences: str, **indices
) -> dict[str, Any]:
    """Check a pool of states and arrays of a slot per sequence; return its part of a `Call`.

    `symbols` are those of the states of all sequences, `sequences` is the symbol of their number.
    Without strides it is dense.
    """
    check.array("state", state, symbols.replace("N", "slots"), check.state_dtypes)
    count, slots = check.sizes[sequences], check.sizes["slots"]
    for name, x in indices.items():
        if x is not None:
            check.integers(name, x)
            check.per_sequence(name, x, sequences)
    if indices["state_indices"] is None and slots != count:
        raise ValueError(
            f"state: expected one slot per sequence, slots = {sequences} = {count}, or"
            f" state_indices, got slots = {slots}"
        )
    stride = state.dtype.itemsize * math.prod(state.shape[1:])
    offset = 0
    if lies is not None:
        stride, offset = _slot_stride(state, lies.strides, stride), lies.offset
    return dict(
        pool_dtype=state.dtype,
        pool_stride=stride // state.dtype.itemsize,
        pool_alignment=math.gcd(POOL_ALIGNMENT, offset, stride),
    )


def _slot_stride(state: Look, strides: tuple[int, ...], size: int) -> int:
    """Return the bytes from one slot to the next; a slot of `size` bytes lies whole."""
    if 0 in state.shape:  # strides of no element say nothing
        return size
    within, dense = state.dtype.itemsize, True
    for n, stride in zip(state.shape[:0:-1], strides[:0:-1], strict=True):
        dense = dense and (n == 1 or stride == within)
        within *= n
    apart = strides[0] >= size and strides[0] % state.dtype.itemsize == 0
    if not dense or (state.shape[0] > 1 and not apart):
        raise ValueError(
            "state: expected slots that are C-contiguous, one after the other,"
            f" got strides {strides}"
        )
    return strides[0] if state.shape[0] > 1 else size


def _float_dtype(x: AnyLook) -> np.dtype:
    assert isinstance(x, Look)
    return FLOAT_DTYPES[dtype_name(x.dtype)]


def _found(look: AnyLook) -> str:
    if isinstance(look, type):
        return describe(look)
    return describe(look.cls if isinstance(look, RawLook) else type(look))


def _shown(axes) -> str:
    """Write axes as Python writes a shape."""
    return f"({', '.join(axes)}{',' * (len(axes) == 1)})"


def _one_of(names) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def options_of(check: Checker, scale, qk_l2norm, state_layout) -> dict:
    if not isinstance(state_layout, str):
        raise TypeError(f'state_layout: expected "kv" or "vk", got {describe(type(state_layout))}')
    if state_layout not in ("kv", "vk"):
        raise ValueError(f'state_layout: expected "kv" or "vk", got {state_layout!r}')
    return dict(
        scale=scale_of(scale, check.sizes["K"]),
        qk_l2norm=qk_l2norm_of(qk_l2norm),
        state_layout=state_layout,
        symbols="N HV K V" if state_layout == "kv" else "N HV V K",
    )


def qk_l2norm_of(qk_l2norm) -> bool:
    if not isinstance(qk_l2norm, bool | np.bool_):
        raise TypeError(f"qk_l2norm: expected True or False, got {describe(type(qk_l2norm))}")
    return bool(qk_l2norm)


def scale_of(scale, K: int) -> float:
    if scale is None:
        return K**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(
            f"scale: expected a number or None (K ** -0.5), got {describe(type(scale))}"
        )
    try:
        number = float(scale)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"scale: expected a finite number, got {number}")
    return number or 0.0  # zero has one sign: -0.0 would be found as 0.0


def chunk_size_of(chunk_size, name: str = "chunk_size") -> int | None:
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral):
        raise TypeError(f"{name}: expected an integer or None, got {describe(type(chunk_size))}")
    if chunk_size < 1:
        raise ValueError(f"{name}: expected at least 1, got {chunk_size}")
    return int(chunk_size)
