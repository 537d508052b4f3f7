"""P X + H, transfers applied to a state or to another, one after the other: `tokens/affine.cu`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..spec import C_TYPES, Launch, Plan, carve, i32

# Of a block: threads, columns of what it makes, and rows of the tile of P in its shared memory, of
# so many bytes that lie so many apart.
THREADS, COLUMNS, TILE_ROWS, TILE_BYTES, PITCH = 128, 16, 128, 128, 128 + 16


class Maps(NamedTuple):
    """Where P, X and H begin in their arrays, and those of later maps after them, in elements."""

    number: int = 1
    p: int = 0
    x: int = 0
    h: int = 0
    step: int = 0


ONE = Maps()


def maps_of_rows(ranks: range, shape: tuple[int, int, int, int]) -> Maps:
    """Find the maps of ranks in the rows of an array, each P and then H, from the H of the first.

    `shape` is that of H, (N, HV, K, V).
    """
    N, HV, K, V = shape
    maps, h = N * HV * K * K, N * HV * K * V
    at = [rank * (maps + h) for rank in ranks]
    step = (ranks.step or 1) * (maps + h)
    return Maps(len(ranks) - 1, p=at[1], x=at[0] + maps, h=at[1] + maps, step=step)


@lru_cache(256)
def plan_affine(shape: tuple, columns: int, dtype, add: bool, maps: Maps = ONE) -> Plan:
    """Plan P X, or with `add` P X + H, for stacks (N, HV, K, .); of several maps with `add`."""
    if dtype.name not in ("float32", "float64"):
        raise NotImplementedError(
            f"h: transfers of {dtype.name} are not supported on CuPy arrays; those that"
            " sequence_transfer returns are float32"
        )
    like = ((*shape, columns), dtype)
    between = {"spare": like} if add and maps.number > 1 else {}
    launch = affine_launch(shape, columns, dtype, add, maps)
    return Plan((launch,), {"y": like}, between)


def affine_launch(shape: tuple, columns: int, dtype, add: bool, maps: Maps) -> Launch:
    """Every map in turn; the state between two of them is in `y` and `spare`."""
    N, HV, K = shape
    vector = math.gcd(K, 16 // dtype.itemsize)
    return Launch(
        "tokens/affine.cu",
        "affine",
        (("REAL", C_TYPES[dtype.name]), ("ADD", int(add)), ("VECTOR", vector)),
        N * HV * -(-columns // COLUMNS),
        THREADS,
        carve((TILE_ROWS * PITCH, 1), (TILE_BYTES * COLUMNS, 1)),
        (
            "p",
            "x",
            "h" if add else None,
            "y",
            "spare" if add and maps.number > 1 else None,
            *(np.int64(n) for n in (maps.p, maps.x, maps.h, maps.step)),
            i32(maps.number),
            i32(K),
            i32(columns),
        ),
    )
