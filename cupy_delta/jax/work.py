"""What a custom call is told: the function, its `Call`, and what its buffers are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import problem as checks
from ..arrays import FLOAT_DTYPES, Look, RawLook
from ..call import Call
from ..raw import BETAS, GATES
from ..typing import Integer, Real, StateLayout

# The backward returns the gradient of input x as dx.
WHOLE, RECURRENT, STEP = "chunk_delta_rule", "recurrent_delta_rule", "delta_rule_step"
FORWARD, BACKWARD = "chunk_delta_rule_fwd", "chunk_delta_rule_bwd"


class Buffer(NamedTuple):
    """A buffer of a custom call."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def buffers_of(arrays: Mapping[str, Any]) -> tuple[Buffer, ...]:
    """Describe arrays by name."""
    return tuple(Buffer(name, x.shape, x.dtype) for name, x in arrays.items())


class Options(NamedTuple):
    """The options of an operator that are no arrays."""

    scale: Real | None = None
    qk_l2norm: bool = False
    chunk_size: Integer | None = None
    state_layout: StateLayout = "kv"


def look_of(x: Any) -> Look | RawLook | None:
    """Describe what is an array or has some."""
    if isinstance(x, GATES):
        return RawLook(type(x), tuple(map(look_of, (x.a, x.A_log, x.dt_bias))), x.bound)
    if isinstance(x, BETAS):
        return RawLook(type(x), (look_of(x.logits),), x.scale)
    return None if x is None else Look("jax", x.dtype, x.shape, None)


def described(function: str, options: Options, arrays: Mapping[str, Any]) -> Call:
    """Check a call by the looks of its arrays, and return what is known of it."""
    looks = {name: look_of(x) for name, x in arrays.items()}
    inputs = [looks.get(name) for name in ("q", "k", "v", "beta", "g")]
    chosen = options.scale, options.qk_l2norm, options.state_layout
    if function == STEP:
        found = (*inputs, None, looks["state"], looks.get("state_indices"), None, None, None)
        return checks.step_call(found, *chosen)
    shapes = ("B T HV", "B T HV V") if function == RECURRENT else ("B T HV",)
    found = (*inputs, looks.get("initial_state"), looks.get("cu_seqlens"), None)
    return checks.operator_call(found, shapes, *chosen, options.chunk_size, wide_states=True)


@dataclass(frozen=True, eq=False)
class Work:
    """One custom call.

    It travels in the program as an attribute, so that a program needs nothing of the process that
    traced it: one that was kept on disk or exported runs in another. The buffers may be fewer or
    more than the function's inputs and outputs, and of other dtypes: that is the backend's affair.
    """

    function: str
    call: Call
    sources: tuple[Buffer, ...]
    targets: tuple[Buffer, ...]

    def text(self) -> str:
        """Return it as the attribute."""
        call = {f.name: getattr(self.call, f.name) for f in _FIELDS}
        buffers = [[*some] for some in (self.sources, self.targets)]
        return json.dumps([self.function, call, *buffers], default=str, separators=(",", ":"))


_FIELDS = [f for f in fields(Call) if f.init]


@lru_cache(4096)
def work_of(text: bytes) -> Work:
    """Read the attribute."""
    function, call, *buffers = json.loads(text)
    for name in ("dtype", "pool_dtype"):
        call[name] = call[name] and _dtype(call[name])
    sources, targets = (
        tuple(Buffer(name, tuple(shape), _dtype(dtype)) for name, shape, dtype in some)
        for some in buffers
    )
    return Work(function, Call(**call), sources, targets)


def _dtype(name: str) -> np.dtype:
    return FLOAT_DTYPES[name] if name in FLOAT_DTYPES else np.dtype(name)
