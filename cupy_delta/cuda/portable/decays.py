"""What kernels keep of a gate, as in `tiles/decay.cuh`; and the launch of `portable/decays.cu`."""

from __future__ import annotations

from ...call import Call
from ..spec import SUMS, Launch, carve, i32, normal, padded, slots

# What a gate per key channel leaves for walks: rows times their decays, and the decay of a chunk.
CHANNEL_ARRAYS = ("k_read", "q_read", "k_write", "channel_decays")


def decay_shared(call: Call, chunk: int) -> list[tuple[int, int]]:
    """Shared memory of a chunk's decays: two floats per token with a scalar gate."""
    return [(chunk, 8)] if call.gate == "scalar" else []


def walk_decay_shared(call: Call, chunk: int) -> list[tuple[int, int]]:
    """Shared memory of a chunk's decays in walks: one float per key channel with such a gate."""
    return [(padded(call.K), 4)] if call.gate == "channel" else decay_shared(call, chunk)


def read_rows(call: Call, name: str) -> str:
    """Name of the rows of q or k with which walks read the state."""
    return f"{name}_read" if call.gate == "channel" else normal(call, name)


def channel_written(call: Call) -> tuple[str, ...]:
    """Return what walks are given beside them with a gate per key channel."""
    return ("k_write", "channel_decays") if call.gate == "channel" else ()


def decays_of(call: Call) -> str | None:
    """Name of the array of every token's decays, as walks read them with a scalar gate."""
    return "decays" if call.gate == "scalar" else None


def channel_arrays(call: Call, chunk: int) -> dict:
    """Return the arrays of `CHANNEL_ARRAYS`."""
    rows = ((*call.token_shape, call.K), call.dtype)
    arrays: dict = dict.fromkeys(CHANNEL_ARRAYS[:3], rows)
    return arrays | {"channel_decays": ((slots(call, chunk), call.HV, call.K), SUMS)}


def decay_arrays(call: Call, chunk: int) -> dict:
    """Return what walks read of a gate."""
    if call.gate == "channel":
        return channel_arrays(call, chunk)
    return {"decays": ((*call.token_shape, 2), SUMS)} if call.gate else {}


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
