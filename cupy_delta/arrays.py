"""What kind of array something is, without importing the framework it belongs to."""

from __future__ import annotations

import sys
from functools import cache

import ml_dtypes
import numpy as np

FLOAT_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@cache
def dtype_name(dtype: np.dtype) -> str:
    """Name a dtype, of either byte order; NumPy takes a microsecond for it."""
    return dtype.name


def kind_of(x) -> str | None:
    """Return "numpy", "cupy", or None for anything that is neither.

    Masked arrays and matrices are not accepted: their arithmetic differs from that of arrays.
    """
    if type(x) is np.ndarray:
        return "numpy"
    if isinstance(x, np.ndarray):
        return None if isinstance(x, np.ma.MaskedArray | np.matrix) else "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return "cupy"
    return None


def describe(x) -> str:
    """Name a wrong argument's type the way its owner would."""
    cls = type(x)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def overlaps(x, y) -> bool:
    """Whether two arrays of one kind share memory."""
    if kind_of(x) == "cupy":
        import cupy

        return bool(cupy.may_share_memory(x, y))
    try:
        return np.shares_memory(x, y, max_work=10_000)
    except np.exceptions.TooHardError:
        return True
