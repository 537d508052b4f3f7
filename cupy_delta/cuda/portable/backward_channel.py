"""The launch of `portable/backward_channel.cu`: gradients with a gate per key channel."""

from __future__ import annotations

from ...call import Call
from ..spec import (
    C_TYPES,
    DeviceFacts,
    Launch,
    carve,
    gradient_arguments,
    i32,
    padded,
    pitch,
    slots,
)

BLOCK = 16
# Key channels of a block of threads by tokens of a chunk: a thread has 16 tokens of a channel.
KEYS = {16: 128, 32: 64, 64: 64}


def backward_channel_launch(call: Call, chunk: int, facts: DeviceFacts) -> Launch:
    """The chunk-parallel gradients, with as wide a slice of values as fits."""
    keys = min(KEYS[chunk], padded(call.K))
    warps = 8 if chunk == 64 else 4
    for slice_ in (64, 32, 16) if call.dtype.itemsize == 2 else (32, 16):
        slice_ = min(slice_, padded(call.V))
        shared = _shared(call, chunk, keys, slice_)
        if shared <= facts.shared_bytes:
            break
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        CHUNK=chunk,
        VARLEN=int(call.varlen),
        WARPS=warps,
        SLICE=slice_,
        KEYS=keys,
    )
    key_slices = -(-padded(call.K) // keys)
    return Launch(
        "portable/backward_channel.cu",
        "backward_channel",
        tuple(defines.items()),
        slots(call, chunk) * call.H * key_slices if call.T else 0,
        32 * warps,
        shared,
        (*gradient_arguments(call), i32(call.HV)),
    )


def _shared(call: Call, chunk: int, keys: int, slice_: int) -> int:
    """Bytes of shared memory, as `Tiles` of the kernel takes them."""
    size, blocks = call.dtype.itemsize, chunk // BLOCK
    rows, floats = (chunk * pitch(keys, size), size), (chunk * pitch(keys, 4), 4)
    unit = (blocks * keys, 4)
    values = carve((2 * slice_ * pitch(keys, size) + 3 * chunk * pitch(slice_, size), size))
    pairs = carve(floats, floats, floats, (chunk * (chunk + 2), 8))
    arrays = [rows, rows, floats, (blocks * keys, 8), unit]
    if blocks > 1:
        arrays.append((blocks * (blocks - 1) // 2 * keys, 4))
    return carve(*arrays, unit, unit, (chunk, 4), (chunk, 4), (max(values, pairs), 1))
