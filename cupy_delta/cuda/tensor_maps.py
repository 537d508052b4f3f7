"""TMA maps of arrays, encoded by the CUDA driver."""

from __future__ import annotations

import ctypes
import sys
from functools import cache, lru_cache

import numpy as np

MAP_BYTES = 128
# Values of the driver's enums: 16-bit elements, 256-byte promotion into L2; swizzle by the elements
# of a box's rows.
UINT16, NO_INTERLEAVE, PROMOTE_256B, FILL_ZERO = 1, 0, 3, 0
SWIZZLE = {16: 1, 32: 2, 64: 3}


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@lru_cache(4096)
def tensor_map(address: int, shape: tuple, box: tuple) -> np.ndarray:
    """Encode the map of an array of 16-bit elements.

    Parameters
    ----------
    address : int
        Of the first element in device memory, a multiple of 16.
    shape, box : tuple of int
        Sizes of the C-contiguous array and of a box of it, outermost axis first. A box is 16, 32
        or 64 elements wide, and swizzled over that width.

    Returns
    -------
    (1,) ndarray
        128 bytes, to be passed to a kernel by value.
    """
    rank = len(shape)
    memory = np.zeros(2 * MAP_BYTES, np.uint8)
    start = -memory.ctypes.data % 64  # the driver writes to a multiple of 64
    encoded = memory[start : start + MAP_BYTES]
    strides = np.cumprod(shape[:0:-1]) * 2
    failed = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(encoded.ctypes.data),
        ctypes.c_int(UINT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*shape[::-1]),
        (ctypes.c_uint64 * (rank - 1))(*map(int, strides)),
        (ctypes.c_uint32 * rank)(*box[::-1]),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(NO_INTERLEAVE),
        ctypes.c_int(SWIZZLE[box[-1]]),
        ctypes.c_int(PROMOTE_256B),
        ctypes.c_int(FILL_ZERO),
    )
    if failed:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {failed} for an array of shape {shape}")
    return encoded.view(f"V{MAP_BYTES}").copy()
