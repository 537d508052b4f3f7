"""Factors and walks of training on compute capability 9.0: launches, and how work is divided."""

from __future__ import annotations

from itertools import product

import numpy as np

from ...call import Call
from ..spec import (
    DeviceFacts,
    Launch,
    TensorBox,
    carve,
    i32,
    normal,
    slots,
    variant,
)
from . import forward
from .forward import (
    BARRIER,
    BOX,
    CHUNK,
    INVERSE,
    JOIN,
    JOIN_BARRIERS,
    LAUNCH,
    SEGMENTS,
    TILE,
    Division,
    Part,
    blocks,
    box,
    transfer_box,
    transfer_slices,
)

# Microseconds on an H200, by slices per block: per chunk of a walk, and of a transfer.
FORWARD = {1: 1.7, 2: 2.55}
FORWARD_TRANSFER = {1: 1.38, 2: 1.9}
BACKWARD = {1: 1.5, 2: 1.85}
BACKWARD_TRANSFER = {1: 0.98, 2: 1.4}
BANDWIDTH = 3.65e6  # bytes per microsecond
# Chunks that are loaded ahead, by slices per block.
FORWARD_STAGES = {1: 3, 2: 2}
BACKWARD_STAGES = {1: 3, 2: 3}


def available(call: Call, facts: DeviceFacts) -> bool:
    """Whether all of training runs on the kernels for compute capability 9.0."""
    return forward.available(call, facts) and call.gate is None


def factors_shared(K: int) -> int:
    """Return the bytes of shared memory of the factors, as sm90/factors.cu carves them."""
    count, size = TILE
    # M in three blocks of 32 rows, and of two cores what lies on the diagonal.
    area = max(2 * -(-K // BOX) * count * size, 7 * INVERSE // 2 * 4)
    return carve((area, 1), (2 * CHUNK, 4), (1, BARRIER))


def factors_launch(call: Call) -> Launch:
    """The core of every value head and P of every key head, all chunks at once."""
    p = call
    keys = (p.B, p.T, p.H, p.K)
    return Launch(
        "sm90/factors.cu",
        "wy_factors_hopper",
        variant(p, CHUNK),
        slots(p, CHUNK) * p.H,
        128,
        factors_shared(p.K),
        (
            box(normal(p, "q"), keys),
            box(normal(p, "k"), keys),
            "beta",
            "cu_seqlens",
            "core",
            "p",
            i32(p.N),
            i32(p.T),
            i32(p.H),
            i32(p.HV),
        ),
        arch="sm_90a",
    )


def division(
    call: Call, facts: DeviceFacts, walk: dict, transfer: dict, written_rows: int
) -> Division:
    """Return the division of a walk that takes the least time by the constants above."""
    p = call
    chunks = max(1, -(-p.B * p.T // (CHUNK * max(1, p.N))))
    pairs = p.N * p.HV
    widths = (1,) if p.V <= BOX else (2, 1)
    # What a walk moves per chunk and value head: keys, rows of values and factors, a state.
    rows = 2 * p.K / p.groups + (1 + written_rows) * p.V + 2 * CHUNK
    traffic = pairs * chunks * (CHUNK * rows + p.K * p.V) * p.dtype.itemsize / BANDWIDTH

    def rounds(count: int) -> int:
        return -(-count // facts.sm_count)

    def cost(d: Division) -> float:
        length = -(-chunks // d.segments)
        count = pairs * d.segments * blocks(p.V, d.math)
        time = max(traffic, rounds(count) * length * walk[d.math])
        if d.segments > 1:
            cut = pairs * (d.segments - 1)
            count = cut * transfer_slices(p, d.transfer_math)
            time += rounds(count) * length * transfer[d.transfer_math]
            time += LAUNCH + JOIN * (d.segments - 1)
        return time

    return min((Division(*choice) for choice in product(widths, SEGMENTS, widths)), key=cost)


def forward_division(call: Call, facts: DeviceFacts) -> Division:
    return division(call, facts, FORWARD, FORWARD_TRANSFER, written_rows=2)


def backward_division(call: Call, facts: DeviceFacts) -> Division:
    return division(call, facts, BACKWARD, BACKWARD_TRANSFER, written_rows=1)


def walk_shared(K: int, math: int, stages: int, output: bool, joins: bool) -> int:
    """Return the bytes of shared memory of either walk, as sm90/training/walk.cuh carves them."""
    count, size = TILE
    boxes = -(-K // BOX)
    keys, square, rows = stages * boxes, stages, stages * math
    tiles = [keys, keys, square, square, rows, math * boxes] + [math] * output
    barriers = [(n, BARRIER) for n in (stages, stages, 1, joins * JOIN_BARRIERS)]
    start = carve(*((n * count, size) for n in tiles), align=1024)
    return carve((stages * CHUNK, 4), *barriers, start=start)


def walk_launch(
    call: Call,
    file: str,
    entry: str,
    rows: str,
    results: tuple,
    arguments: tuple,
    *,
    math: int,
    stages: int,
    segments: int,
    transfer: bool = False,
) -> Launch:
    """A walk with core and P given: over `rows` of value channels.

    Its `results`, states first and rows of value channels, leave by TMA.
    """
    p = call
    walked = segments - 1 if transfer else segments
    joins = segments > 1 and not transfer
    slices = transfer_slices(p, math) if transfer else blocks(p.V, math)
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)
    maps = (
        box(normal(p, "q"), keys),
        box(normal(p, "k"), keys),
        box("core", (p.B, p.T, p.HV, CHUNK)),
        box("p", (p.B, p.T, p.H, CHUNK)),
        box(rows, values),
        # A warp stores 16 value channels of 64 key channels.
        TensorBox(results[0], (slots(p, CHUNK), p.HV, p.V, p.K), (1, 1, 16, BOX)),
        *(box(name, values) for name in results[1:]),
    )
    if segments > 1:
        maps += transfer_box(p, segments - 1), "segment_h"
    defines = variant(
        p,
        CHUNK,
        STATE_VK=int(p.state_layout == "vk"),
        JOINS=int(joins),
        TRANSFER=int(transfer),
        MATH=math,
        CHUNK_STAGES=stages,
    )
    sizes = (np.float32(p.scale), i32(p.T), i32(p.H), i32(p.HV), i32(segments))
    return Launch(
        file,
        entry,
        defines,
        p.N * walked * p.HV * slices,
        384 if math == 2 else 160,
        walk_shared(p.K, math, stages, len(results) > 2, joins),
        (*maps, "beta", *arguments, *sizes),
        arch="sm_90a",
    )


def forward_launches(call: Call, d: Division) -> list[Launch]:
    """The walk that leaves o, final_state and what the gradients read, after core and P."""
    walk = walk_launch(
        call,
        "sm90/training.cu",
        "forward_residuals_hopper",
        "v",
        ("states", "o", "corrections"),
        ("initial_state", "cu_seqlens", "o", "final_state", "corrections"),
        math=d.math,
        stages=FORWARD_STAGES[d.math],
        segments=d.segments,
    )
    if d.segments == 1:
        return [walk]
    walked = Part(d.segments, walked=d.segments)
    return [forward.transfer_launch(call, d.transfer_math, walked), walk]


def backward_launches(call: Call, d: Division, has_dfinal: bool) -> list[Launch]:
    """The reverse walk: the gradient of the state leaving each chunk, and G."""

    def walk(start: str | None, end: str | None, math: int, transfer: bool = False) -> Launch:
        return walk_launch(
            call,
            "sm90/backward_state.cu",
            "backward_state_hopper",
            "do",
            ("dstates", "g_rows"),
            (start, "cu_seqlens", "g_rows", end),
            math=math,
            stages=BACKWARD_STAGES[math],
            segments=d.segments,
            transfer=transfer,
        )

    last = walk("dfinal_state" if has_dfinal else None, "dinitial_state", d.math)
    if d.segments == 1:
        return [last]
    return [walk(None, None, d.transfer_math, transfer=True), last]
