"""P X + H, a transfer applied to a state or to another: `tokens/affine.cu`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..spec import C_TYPES, Launch, Plan, i32


@lru_cache(256)
def plan_affine(shape: tuple, columns: int, dtype, add: bool) -> Plan:
    """Plan P X + H for stacks (N, HV, K, .)."""
    if dtype.name not in ("float32", "float64"):
        raise NotImplementedError(
            f"h: transfers of {dtype.name} are not supported on CuPy arrays; those that"
            " sequence_transfer returns are float32"
        )
    launch = affine_launch(shape, columns, dtype, add)
    return Plan((launch,), {"y": ((*shape, columns), dtype)})


def affine_launch(shape: tuple, columns: int, dtype, add: bool) -> Launch:
    """P X, or with `add` P X + H, for stacks (N, HV, K, .)."""
    N, HV, K = shape
    defines = dict(REAL=C_TYPES[dtype.name], ADD=int(add))
    count = N * HV * K * columns
    arguments = ("p", "x", "h", "y", np.int64(count), i32(K), i32(columns))
    return Launch(
        "tokens/affine.cu", "affine", tuple(defines.items()), -(-count // 256), 256, 0, arguments
    )
