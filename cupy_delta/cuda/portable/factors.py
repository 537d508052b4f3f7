"""The WY factors of all chunks: `portable/factors.cu`, and which kernel makes them."""

from __future__ import annotations

from ...call import Call
from ..spec import (
    Launch,
    carve,
    i32,
    normal,
    padded,
    pitch,
    slots,
    variant,
)
from .channel_factors import channel_factors_launch
from .decays import CHANNEL_ARRAYS, decay_shared, decays_of


def core_launch(call: Call, chunk: int) -> Launch:
    """What walks read of all chunks: the core and P, and of a gate its decays."""
    if call.gate == "channel":
        return channel_factors_launch(call, chunk, "core", CHANNEL_ARRAYS)
    return wy_factors_launch(call, chunk, factors=False)


def wy_factors_launch(call: Call, chunk: int, factors: bool) -> Launch:
    """The core and P for the walk, or with `factors` the public T, W and U."""
    size, K, V = call.dtype.itemsize, padded(call.K), padded(call.V)
    square = (chunk * pitch(chunk, 4), 4)
    half = (chunk // 2 * pitch(chunk, 4), 4)
    rows = (chunk * pitch(K, size), size)
    if factors:
        first = [rows, (chunk * pitch(V, size), size), (chunk * pitch(chunk, size), size)]
    else:
        first = [rows, rows, square]
    shared = carve(*first, square, square, square, half, (chunk, 4), *decay_shared(call, chunk))
    core = (None, None) if factors else ("core", "p")
    public = ("t", "w", "u") if factors else (None, None, None)
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
            decays_of(call),
            *public,
            i32(call.N),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )
