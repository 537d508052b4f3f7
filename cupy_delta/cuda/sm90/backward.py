"""The launch of the chunk-parallel gradients on compute capability 9.0."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import DeviceFacts, Launch, TensorBox, carve, i32, normal, slots, variant
from .forward import BARRIER, BOX, CHUNK, TILE, box

THREADS = 384
# Buffers of 64 value channels, by boxes of 64 keys.
STAGES = {1: 4, 2: 3}


def chunk_shared(K: int) -> int:
    """Return the bytes of shared memory, as sm90/backward_chunk.cu carves them."""
    boxes = -(-K // BOX)
    stages = STAGES[boxes]
    count, size = TILE
    keys, square = (boxes * count, size), (count, size)
    tiles = carve((stages * (3 + 2 * boxes) * count, size), keys, keys, square, square, align=1024)
    barriers = (stages, stages, 1, 1, 1, 1, 2)
    return carve((2 * CHUNK, 4), *((count, BARRIER) for count in barriers), start=tiles)


def backward_chunk_launch(call: Call, facts: DeviceFacts) -> Launch:
    """The chunk-parallel gradients: one block per multiprocessor, for many chunks and key heads."""
    p = call
    count = slots(p, CHUNK)
    pairs = count * p.H if p.T else 0
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)

    def states(name: str) -> TensorBox:
        return TensorBox(name, (count, p.HV, p.V, p.K), (1, 1, BOX, BOX))

    arguments = (
        box(normal(p, "q"), keys),
        box(normal(p, "k"), keys),
        box("corrections", values),
        box("g_rows", values),
        box("do", values),
        states("states"),
        states("dstates"),
        "beta",
        "cu_seqlens",
        "dq",
        "dk",
        "dv",
        "dbeta",
        np.float32(p.scale),
        i32(pairs),
        i32(p.N),
        i32(p.T),
        i32(p.H),
        i32(p.HV),
    )
    return Launch(
        "sm90/backward_chunk.cu",
        "backward_chunk_hopper",
        variant(p, CHUNK, SLICE_STAGES=STAGES[-(-p.K // BOX)]),
        min(pairs, facts.sm_count),
        THREADS,
        chunk_shared(p.K),
        arguments,
        arch="sm_90a",
    )
