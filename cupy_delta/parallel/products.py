"""Sums over tokens of outer products, ``sum_t a_t b_t^T`` of every batch row and head."""

from __future__ import annotations

import sys

import numpy as np

from ..arrays import FLOAT_DTYPES, dtype_name, module_of
from ..reference.parallel import for_each

# Of cuBLAS and CUDA: an operand as it lies or transposed, types, float32 sums, its own choice.
AS_IT_IS, TRANSPOSED = 0, 1
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_FLOAT32 = 68
ANY_ALGORITHM = -1


def outer_sum(a, b):
    """Return ``sum_t a_t b_t^T`` (B, H, K, V) for a (B, T, H, K) and b (B, T, H, V) of one dtype.

    Sums are float64 for float64 and float32 for everything else, and so is the result.
    """
    B, T, H, K = a.shape
    V = b.shape[3]
    dtype = FLOAT_DTYPES["float64" if dtype_name(a.dtype) == "float64" else "float32"]
    total = module_of(a).zeros((B, H, K, V), dtype)
    if total.size and T:
        (_on_host if isinstance(a, np.ndarray) else _on_device)(a, b, total)
    return total


def _on_host(a, b, total) -> None:
    def one(n: int, h: int) -> None:
        x, y = (np.asarray(z[n, :, h], total.dtype) for z in (a, b))
        np.matmul(x.T, y, out=total[n, h])

    for_each(one, np.ndindex(*total.shape[:2]))


def _on_device(a, b, total) -> None:
    """One product of cuBLAS for all heads of a batch row, on the arrays as they lie.

    CuPy's own products of 16-bit arrays are 16-bit arrays.
    """
    cupy = sys.modules["cupy"]
    handle = cupy.cuda.device.get_cublas_handle()
    one, zero = np.float32(1).reshape(1), np.float32(0).reshape(1)
    operand = TYPES[dtype_name(a.dtype)]
    a, b = cupy.ascontiguousarray(a), cupy.ascontiguousarray(b)
    (_, T, H, K), V = a.shape, b.shape[3]
    for n in range(len(total)):
        # In cuBLAS' columns: total^T = b^T a, of every head.
        cupy.cuda.cublas.gemmStridedBatchedEx(
            *(handle, AS_IT_IS, TRANSPOSED, V, K, T, one.ctypes.data),
            *(b[n].data.ptr, operand, H * V, V),
            *(a[n].data.ptr, operand, H * K, K),
            *(zero.ctypes.data, total[n].data.ptr, TYPES["float32"], V, K * V),
            *(H, COMPUTE_FLOAT32, ANY_ALGORITHM),
        )
