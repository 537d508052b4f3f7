"""The gradients: the reverse walk, and what is chunk-parallel."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import (
    DeviceFacts,
    Launch,
    Plan,
    carve,
    gradient_arguments,
    gradient_arrays,
    i32,
    padded,
    pitch,
    slots,
    variant,
)
from ..tokens.l2norm import through_norm
from .backward_channel import backward_channel_launch
from .choice import choose, walk_shape
from .decays import channel_written, decay_shared, decays_of, read_rows, walk_decay_shared


def plan_backward(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule_bwd`, from what `plan_training` has left."""
    chunk = choose(call, facts).chunk
    outputs, workspace = gradient_arrays(call, chunk)
    per_channel = call.gate == "channel"
    gradients_launch = backward_channel_launch if per_channel else backward_chunk_launch
    launches = (
        backward_state_launch(call, chunk, facts),
        gradients_launch(call, chunk, facts),
        *through_norm(call),
    )
    return Plan(launches, outputs, workspace)


def backward_state_launch(call: Call, chunk: int, facts: DeviceFacts) -> Launch:
    """The reverse walk: the gradient of the state leaving each chunk, and G."""
    size, K = call.dtype.itemsize, padded(call.K)
    # A warp alone waits for its own loads: two are faster on an H200 with 8 and with 32 heads.
    row_tiles, warps = walk_shape(call, call.V, chunk, facts, row_tiles=1)
    slice_ = 16 * row_tiles * warps
    key_rows = (chunk * pitch(K, size), size)
    square = (chunk * pitch(chunk, size), size)
    per_channel = call.gate == "channel"
    # With a gate per key channel, rows that are read are one tile each for both stages.
    keys = [key_rows] if per_channel else [key_rows, key_rows]
    stage = [*keys, (chunk * pitch(slice_, size), size), square, square, (chunk, 4)]
    stage += walk_decay_shared(call, chunk)
    shared = carve(*stage, *stage, *([key_rows, key_rows] if per_channel else []))
    return Launch(
        "portable/backward_state.cu",
        "backward_state",
        variant(
            call,
            chunk,
            STATE_VK=int(call.state_layout == "vk"),
            WARPS=warps,
            ROW_TILES=row_tiles,
        ),
        call.N * call.HV * -(-padded(call.V) // slice_),
        32 * warps,
        shared,
        (
            read_rows(call, "q"),
            read_rows(call, "k"),
            "core",
            "p",
            "beta",
            decays_of(call),
            *channel_written(call),
            "do",
            "dfinal_state",
            "cu_seqlens",
            "dstates",
            "dy",
            "dinitial_state",
            np.float32(call.scale),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )


def backward_chunk_launch(call: Call, chunk: int, facts: DeviceFacts) -> Launch:
    """The chunk-parallel gradients, with as wide a slice of values as fits."""
    size, K, V = call.dtype.itemsize, padded(call.K), padded(call.V)
    # So that the sums over the group fit the registers of a warp.
    warps = 8 if K > 128 or (K > 64 and (chunk == 64 or call.gate)) else 4
    key_rows = (chunk * pitch(K, size), size)
    square = (chunk * pitch(chunk, size), size)
    gate = decay_shared(call, chunk)
    if gate:
        part = (warps // (chunk // 16) * chunk, 4)
        gate += [part, part, (warps * chunk, 4), (warps, 4)]
    for slice_ in (64, 32, 16) if size == 2 else (32, 16):
        slice_ = min(slice_, V)
        state, rows = (slice_ * pitch(K, size), size), (chunk * pitch(slice_, size), size)
        arrays = [key_rows, key_rows, state, state, rows, rows, rows, square, square, square]
        shared = carve(*arrays, (chunk, 4), (chunk, 4), *gate)
        if shared <= facts.shared_bytes:
            break
    return Launch(
        "portable/backward_chunk.cu",
        "backward_chunk",
        variant(call, chunk, WARPS=warps, SLICE=slice_),
        slots(call, chunk) * call.H if call.T else 0,
        32 * warps,
        shared,
        (*gradient_arguments(call), i32(call.HV)),
    )
