"""The launch of `portable/channel_factors.cu`: what a gate per key channel does in all chunks."""

from __future__ import annotations

from typing import Literal

from ...call import Call
from ..spec import C_TYPES, Launch, carve, i32, normal, padded, pitch, slots

BLOCK = 16
Made = Literal["core", "p", "wu", "rows"]


def channel_factors_launch(call: Call, chunk: int, made: Made, arrays: tuple[str, ...]) -> Launch:
    """The core and P for walks, P alone, or the public T, W and U; and those of `arrays` beside.

    `arrays` are some of `CHANNEL_ARRAYS`; with "rows" only these are made.
    """
    with_q, with_m = made in ("core", "p"), made in ("core", "wu")
    threads = 256 if chunk == 64 else 128
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        CHUNK=chunk,
        VARLEN=int(call.varlen),
        WRITE_CORE=int(made == "core"),
        WRITE_P=int(made == "p"),
        WRITE_WU=int(made == "wu"),
    )

    def given(wanted: bool, name: str) -> str | None:
        return name if wanted else None

    beside = [given(name in arrays, name) for name in ("k_read", "q_read", "k_write")]
    return Launch(
        "portable/channel_factors.cu",
        "channel_factors",
        tuple(defines.items()),
        slots(call, chunk) * call.HV if call.T else 0,
        threads,
        _shared(call, chunk, with_q, with_m, made == "wu"),
        (
            given(with_q, normal(call, "q")),
            normal(call, "k"),
            given(made == "wu", "v"),
            given(with_m, "beta"),
            "g",
            "cu_seqlens",
            given(made == "core", "core"),
            given(with_q, "p"),
            *beside,
            given("channel_decays" in arrays, "channel_decays"),
            *(given(made == "wu", name) for name in ("t", "w", "u")),
            i32(call.N),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )


def _shared(call: Call, chunk: int, with_q: bool, with_m: bool, factors: bool) -> int:
    """Bytes of shared memory, as `Tiles` of the kernel takes them."""
    size, K, V = call.dtype.itemsize, padded(call.K), padded(call.V)
    rows, square = (chunk * pitch(K, size), size), (chunk * pitch(chunk, size), size)
    scaled = ((chunk - BLOCK) * pitch(K, size), size)
    inverse = chunk * 3 // 2 * pitch(chunk, 4) if with_m else 0
    arrays = [rows, *[rows] * with_q]
    if chunk > BLOCK and (with_q or with_m):
        arrays += [scaled] * (1 + with_m + with_q)
    arrays += [
        (max(chunk * pitch(K, 4), inverse), 4),
        (chunk // BLOCK * K, 8),
        (chunk // BLOCK * K, 4),
    ]
    if with_m:
        arrays += [(chunk, 4), (chunk * pitch(chunk, 4), 4)]
    arrays += [square] * with_q
    if factors:
        arrays += [(chunk * pitch(V, size), size), rows, square]
    return carve(*arrays)
