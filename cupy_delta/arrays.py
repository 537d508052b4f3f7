"""What kind of array something is, without importing the framework it belongs to."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .raw import BETAS, GATES

FLOAT_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Look(NamedTuple):
    """What tells one array from another, its memory and values aside: hashable, holds no array."""

    kind: str
    dtype: np.dtype
    shape: tuple[int, ...]
    device: int | None


class RawLook(NamedTuple):
    """What tells one gate or strength of raw parameters from another."""

    cls: type
    arrays: tuple[Look | RawLook | type | None, ...]
    number: float


AnyLook = Look | RawLook | type | None


@cache
def dtype_name(dtype: np.dtype) -> str:
    """Name a dtype, of either byte order; NumPy takes a microsecond for it."""
    return dtype.name


def looks(*arrays: Any) -> tuple[AnyLook, ...]:
    """Describe arrays: a `Look` each, None for None, and the class of anything else.

    What is in the place of `g` or `beta` has a `RawLook`.
    """
    of_cupy = getattr(sys.modules.get("cupy"), "ndarray", ())
    new = tuple.__new__  # a named tuple's own constructor takes longer than all of this
    plain = np.ndarray
    found: list[AnyLook] = []
    for x in arrays:
        if x is None:
            found.append(None)
        elif type(x) is plain:
            found.append(new(Look, ("numpy", x.dtype, x.shape, None)))
        elif isinstance(x, of_cupy):
            found.append(new(Look, ("cupy", x.dtype, x.shape, x.data.device_id)))
        elif isinstance(x, plain) and not _refused(x):
            found.append(new(Look, ("numpy", x.dtype, x.shape, None)))
        elif isinstance(x, GATES):
            found.append(RawLook(type(x), looks(x.a, x.A_log, x.dt_bias), x.bound))
        elif isinstance(x, BETAS):
            found.append(RawLook(type(x), looks(x.logits), x.scale))
        else:
            found.append(type(x))
    return tuple(found)


def _refused(x: np.ndarray) -> bool:
    """Whether the arithmetic of an array's class differs from that of arrays."""
    # To name the second would import it, 10 ms.
    return isinstance(x, (np.matrix, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())))


def places(*arrays: Any) -> tuple | None:
    """Tell where arrays lie in device memory, and how: hashable, holds no array.

    None, if any of them is anything but a CuPy array: what lies on the host has values that are
    looked at.
    """
    of_cupy = getattr(sys.modules.get("cupy"), "ndarray", None)
    if of_cupy is None:
        return None
    found: list[Any] = []
    for x in arrays:
        if type(x) is of_cupy:
            data = x.data
            found += (data.ptr, data.device_id, x.dtype, x.shape, x.strides)
        elif x is None:
            found.append(None)
        else:
            if isinstance(x, GATES):
                part = places(x.a, x.A_log, x.dt_bias)
                found.append((type(x), x.bound, part))
            elif isinstance(x, BETAS):
                part = places(x.logits)
                found.append((type(x), x.scale, part))
            else:
                return None
            if part is None:
                return None
    return tuple(found)


def describe(cls: type) -> str:
    """Name a wrong argument's type the way its owner would."""
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def module_of(x: Any) -> Any:
    """Return the library, NumPy or CuPy, that an array is of."""
    cupy = sys.modules.get("cupy")
    return cupy if isinstance(x, getattr(cupy, "ndarray", ())) else np


def shares_memory(x: Any, y: Any) -> bool:
    """Tell whether two arrays of one kind share memory."""
    if not isinstance(x, np.ndarray):
        return sys.modules["cupy"].may_share_memory(x, y)
    # By where they begin and end, first; strides that are hard to compare may share it.
    return np.may_share_memory(x, y) and np.may_share_memory(x, y, 10_000)  # type: ignore[arg-type]
