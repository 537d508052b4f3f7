"""What kernels keep of a gate, as in `tiles/decay.cuh`; and the launch of `portable/decays.cu`."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import Launch, carve, i32, slots


def decay_shared(call: Call, chunk: int) -> list[tuple[int, int]]:
    """Shared memory of a chunk's decays: two floats per token; none without a gate."""
    return [] if call.gate is None else [(chunk, 8)]


def decays_of(call: Call) -> str | None:
    """Name of the array of every token's decays, as walks read them; None without a gate."""
    return None if call.gate is None else "decays"


def decay_arrays(call: Call) -> dict:
    """Return that array, or nothing."""
    if call.gate is None:
        return {}
    return {"decays": ((*call.token_shape, 2), np.dtype(np.float32))}


def decays_launch(call: Call, chunk: int) -> Launch:
    """The decays of every token, where the factors have not left them."""
    defines = dict(CHUNK=chunk, HAS_GATE=1, VARLEN=int(call.varlen))
    return Launch(
        "portable/decays.cu",
        "decays",
        tuple(defines.items()),
        slots(call, chunk) * call.HV if call.T else 0,
        32,
        carve(*decay_shared(call, chunk)),
        ("g", "cu_seqlens", "decays", i32(call.N), i32(call.T), i32(call.HV)),
    )
