"""The launches of `portable/factors.cu` and `portable/gate_sums.cu`, which need no state."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import (
    DeviceFacts,
    Launch,
    carve,
    fits,
    i32,
    normal,
    padded,
    pitch,
    running_sum,
    slots,
    variant,
)


def wy_factors_launch(call: Call, chunk: int, facts: DeviceFacts, factors: bool) -> Launch:
    """The core and P for the walk, or with `factors` the public T, W and U."""
    size, K, V = call.dtype.itemsize, padded(call.K), padded(call.V)
    square = (chunk * pitch(chunk, 4), 4)
    half = (chunk // 2 * pitch(chunk, 4), 4)
    rows = (chunk * pitch(K, size), size)
    if factors:
        first = [rows, (chunk * pitch(V, size), size), (chunk * pitch(chunk, size), size)]
    else:
        first = [rows, rows, square]
    shared = carve(*first, square, square, square, half, (chunk, 4), (chunk, 8))
    fits("the WY factors", chunk, shared, facts)
    core, public = ("core", "p"), ("t", "w", "u")
    core, public = ((None,) * 2, public) if factors else (core, (None,) * 3)
    return Launch(
        "portable/factors.cu",
        "wy_factors",
        variant(call, chunk, WRITE_CORE=int(not factors), WRITE_WU=int(factors)),
        slots(call, chunk) * call.H if call.T else 0,
        128,
        shared,
        (
            None if factors else normal(call, "q"),
            normal(call, "k"),
            "v" if factors else None,
            "beta",
            "g",
            "cu_seqlens",
            *core,
            running_sum(call),
            *public,
            i32(call.N),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )


def gate_sums_launch(call: Call, chunk: int) -> Launch:
    """The running sums of g in each chunk, where the factors have not left them."""
    count = slots(call, chunk)
    defines = dict(CHUNK=chunk, VARLEN=int(call.varlen))
    return Launch(
        "portable/gate_sums.cu",
        "gate_sums",
        tuple(defines.items()),
        -(-count * call.HV // 128) if call.T else 0,
        128,
        0,
        (
            "g",
            "cu_seqlens",
            "G",
            np.int64(count),
            i32(call.N),
            i32(call.T),
            i32(call.HV),
        ),
    )


def running_sums(call: Call) -> dict:
    """Return the array of the running sums of g in each chunk; none without a gate."""
    if call.gate is None:
        return {}
    return {"G": ((call.B, call.T, call.HV), np.dtype(np.float64))}
