"""TMA maps of arrays, encoded by the CUDA driver."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from itertools import accumulate
from operator import mul

import numpy as np

MAP_BYTES, ALIGNMENT = 128, 64
# Values of the driver's enums: 16-bit elements, 256-byte promotion into L2; swizzle by the elements
# of a box's rows.
UINT16, NO_INTERLEAVE, PROMOTE_256B, FILL_ZERO = 1, 0, 3, 0
SWIZZLE = {16: 1, 32: 2, 64: 3}


@cache
def _encode():
    """Return the driver's function, told what it takes."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    encode, enum, pointer = library.cuTensorMapEncodeTiled, ctypes.c_int, ctypes.c_void_p
    encode.argtypes = [pointer, enum, ctypes.c_uint32, *[pointer] * 5, *[enum] * 4]
    return encode


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
    memory = np.empty(MAP_BYTES + ALIGNMENT, np.uint8)
    start = memory.ctypes.data
    offset = -start % ALIGNMENT  # the driver writes to a multiple of 64
    strides = accumulate(shape[:0:-1], mul, initial=2)
    sizes = (ctypes.c_uint64 * (2 * rank))(*shape[::-1], *strides)
    boxes = (ctypes.c_uint32 * (2 * rank))(*box[::-1], *[1] * rank)
    at, of = ctypes.addressof(sizes), ctypes.addressof(boxes)
    failed = _encode()(
        start + offset,
        UINT16,
        rank,
        address,
        at,
        at + 8 * (rank + 1),  # past the sizes and the stride of the innermost axis
        of,
        of + 4 * rank,
        NO_INTERLEAVE,
        SWIZZLE[box[-1]],
        PROMOTE_256B,
        FILL_ZERO,
    )
    if failed:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {failed} for an array of shape {shape}")
    return memory[offset : offset + MAP_BYTES].view(f"V{MAP_BYTES}")
