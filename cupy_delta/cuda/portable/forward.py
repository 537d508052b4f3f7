"""The launches of the walk over the chunks, of its segments, and of outputs from states."""

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

# Chunks per segment for which cutting a sequence pays its extra launches (measured on an H200).
SEGMENT_CHUNKS = 64


def walk_shape(
    call: Call, V: int, chunk: int, facts: DeviceFacts, row_tiles: int, walked: int = 1
) -> tuple[int, int]:
    """Return (16-row tiles of value channels per warp, warps per block) for a walk.

    `walked` is the number of segments of each sequence that are walked.

    Up to four warps share the keys of a block; fewer where the blocks would leave more than a
    quarter of the multiprocessors idle, down to two.
    """
    rows = padded(V) // 16
    row_tiles = 1 if call.dtype.itemsize == 4 or chunk > 32 else min(row_tiles, rows)
    warps = min(4, -(-rows // row_tiles))
    sequences = call.N * call.HV * walked
    # Measured on an H200: wide blocks once they fill three quarters of it, but at least two warps.
    while warps > 2 and sequences * -(-rows // (row_tiles * warps)) < 0.75 * facts.sm_count:
        warps = -(-warps // 2)
    return row_tiles, warps


def segment_count(call: Call, chunk: int, facts: DeviceFacts) -> int:
    """Segments to cut every sequence into: 1, or 4 or 8 for long sequences of few heads.

    Cutting costs a walk of [P | H], about 4/3 of the walk itself: two segments gain nothing, and
    nothing is gained where one walk takes half of the multiprocessors.
    """
    blocks = call.N * call.HV * -(-padded(call.V) // 32)
    chunks = call.B * call.T // (chunk * max(1, call.N))
    for segments in (8, 4):
        if blocks and 2 * blocks <= facts.sm_count and chunks >= segments * SEGMENT_CHUNKS:
            return segments
    return 1


def segment_states_launch(call: Call, segments: int) -> Launch:
    """The states that enter all segments, from the transfers of all but the last."""
    defines = dict(
        HEAD_K=call.K,
        HEAD_V=call.V,
        SEGMENTS=segments,
        STATE_VK=int(call.state_layout == "vk"),
    )
    columns = (padded(call.K) * 8, 4)
    return Launch(
        "portable/segment_states.cu",
        "segment_states",
        tuple(defines.items()),
        call.N * call.HV * -(-call.V // 8),
        128,
        carve(columns, columns),
        ("initial_state", "segment_p", "segment_h", "entering", i32(call.HV)),
    )


def walk_launch(
    call: Call,
    chunk: int,
    facts: DeviceFacts,
    *,
    factors: bool = False,
    zero_v: bool = False,
    segments: int = 1,
    transfer: bool = False,
    states: str | None = None,
    output: str | None = "o",
    initial: str | None = "initial_state",
    final: str = "final_state",
) -> Launch:
    """The walk over the chunks, of a sequence's segments at once.

    With `transfer` of all segments but the last, from zero, or with `zero_v` from the identity.
    `states` is the C type of written states, or None.
    """
    walked = segments - 1 if transfer else segments
    size, K = call.dtype.itemsize, padded(call.K)
    V = call.K if zero_v else call.V
    tiles = 2 if K <= 64 else 1
    row_tiles, warps = walk_shape(call, V, chunk, facts, tiles, walked)
    slice_ = 16 * row_tiles * warps
    square = (chunk * pitch(chunk, size), size)
    key_rows = (chunk * pitch(K, size), size)
    stage = [key_rows, (chunk * pitch(slice_, size), size)]
    if not transfer:
        stage.append(key_rows)
    if not factors:
        stage += [square, (chunk, 4)]
    if not factors and not transfer:
        stage.append(square)
    if call.gate is not None:
        stage.append((chunk, 8))
    shared = carve(*stage, *stage)
    fits("the state pass", chunk, shared, facts)
    defines = variant(
        call,
        chunk,
        HEAD_V=V,
        STATE_VK=int(call.state_layout == "vk" and not zero_v),
        FROM_FACTORS=int(factors),
        ZERO_V=int(zero_v),
        SEGMENTS=segments,
        TRANSFER=int(transfer),
        WRITE_STATES=int(states is not None),
        STATES_DTYPE=states or "float",
        WARPS=warps,
        ROW_TILES=row_tiles,
    )
    return Launch(
        "portable/forward.cu",
        "forward",
        defines,
        call.N * walked * call.HV * -(-padded(V) // slice_),
        32 * warps,
        shared,
        (
            "w" if factors else normal(call, "q"),
            normal(call, "k"),
            None if zero_v else ("u" if factors else "v"),
            None if factors else "core",
            None if factors else "p",
            None if factors else "beta",
            running_sum(call),
            initial,
            "cu_seqlens",
            output,
            final,
            "states" if states else None,
            ("v_new" if factors else "corrections") if states else None,
            np.float32(call.scale),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )


def chunk_output_launch(call: Call, chunk: int, facts: DeviceFacts) -> Launch:
    """Outputs of all chunks from their states."""
    size, K, V = call.dtype.itemsize, padded(call.K), padded(call.V)
    slice_ = min(V, 64)
    shared = carve(
        (chunk * pitch(K, size), size),
        (chunk * pitch(K, size), size),
        (chunk * pitch(slice_, size), size),
        (K * pitch(slice_, size), size),
        (chunk * pitch(chunk, size), size),
        *([] if call.gate is None else [(chunk, 8)]),
    )
    fits("chunk outputs", chunk, shared, facts)
    slices = -(-V // slice_)
    return Launch(
        "portable/chunk_output.cu",
        "chunk_output",
        variant(call, chunk, SLICE=slice_),
        slots(call, chunk) * call.HV * slices if call.T else 0,
        128,
        shared,
        (
            normal(call, "q"),
            normal(call, "k"),
            "v_new",
            "states",
            running_sum(call),
            "cu_seqlens",
            "o",
            np.float32(call.scale),
            i32(call.N),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )
