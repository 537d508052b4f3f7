"""The launches of the kernels for compute capability 9.0, and when they are the ones to use."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from ..problem import Problem
from .kernels import DeviceFacts, Launch, TensorBox, carve, i32, normal, variant

CHUNK = 64
BOX = 64  # elements of 16 bits in a row of a swizzled tile
WARP_CHANNELS = 16  # of the output that a warp sends
TILE = (CHUNK * BOX, 2)
INVERSE = CHUNK * 36
BARRIER = 8
A_STAGES = 2
# Microseconds on an H200: per chunk of a walk with one or two slices per block and of a transfer;
# of cutting and joining, and more per segment and head that is joined.
WALK = {1: 1.66, 2: 2.52}
TRANSFER = {1: 1.1, 2: 1.36}
JOIN, JOIN_SEGMENT = 15.0, 0.5
SEGMENTS = (1, 2, 3, 4, 5, 6, 8)
# Buffers of K and Q, of V, of T and P, by slices per block. All fit the 227 KiB of these GPUs.
STAGES = {1: (3, 3, 3), 2: (3, 3, 3)}
# Blocks of a transfer that solve chunks for each other, where their number allows; their buffers.
CLUSTER, CLUSTER_STAGES = 2, (4, 2, 4)


class Division(NamedTuple):
    """Slices of 64 channels per block, segments per sequence, slices per block of a transfer."""

    math: int
    segments: int = 1
    transfer_math: int = 1


def available(problem: Problem, facts: DeviceFacts) -> bool:
    """Whether the kernel for compute capability 9.0 computes this problem's `chunk_delta_rule`."""
    return (
        facts.capability == (9, 0)
        and problem.dtype.itemsize == 2
        and problem.chunk_size in (None, CHUNK)
        and problem.K % 8 == 0
        and problem.V % 8 == 0
        and problem.K <= 128
        and problem.B * problem.T > 0
    )


def box(name: str, shape: tuple, channels: int = BOX) -> TensorBox:
    """64 tokens of one head and some of its channels."""
    return TensorBox(name, tuple(shape), (1, CHUNK, 1, channels))


def division(problem: Problem, facts: DeviceFacts) -> Division:
    """Return the division of a forward walk that takes the least time by the constants above."""
    p = problem
    chunks = max(1, -(-p.B * p.T // (CHUNK * max(1, p.N))))
    pairs = p.N * p.HV
    # With two slices a block's registers do not suffice for the decays of a gate.
    widths = (1,) if p.g is not None or p.V <= BOX else (2, 1)

    def blocks(size: int, math: int) -> int:
        return -(-size // (BOX * math))

    def walk(count: int, length: int, microseconds: float) -> float:
        return -(-count // facts.sm_count) * length * microseconds

    def cost(d: Division) -> float:
        length = -(-chunks // d.segments)
        time = walk(pairs * d.segments * blocks(p.V, d.math), length, WALK[d.math])
        if d.segments > 1:
            cut = pairs * (d.segments - 1)
            slices = blocks(p.V, d.transfer_math) + blocks(p.K, d.transfer_math)
            time += walk(cut * slices, length, TRANSFER[d.transfer_math])
            time += JOIN + JOIN_SEGMENT * cut
        return time

    return min((Division(*choice) for choice in product(widths, SEGMENTS, widths)), key=cost)


def walk_shared(K: int, math: int, solvers: int, gate: bool, output: bool, stages: tuple) -> int:
    """Return the bytes of shared memory of a walk, as forward_hopper.cu carves them."""
    keys, values, factors = stages
    count, size = TILE
    boxes = -(-K // BOX)
    tiles = [(keys * boxes * (1 + output) * count, size)]
    if output:
        tiles += [(math * count, size), (factors * count, size)]
    tiles += [(values * math * count, size), (factors * count, size)]
    rest = [(A_STAGES * INVERSE, 4), (factors * CHUNK, 4)]
    if gate:
        rest += [(factors * CHUNK, 4), (factors * CHUNK, 4), (solvers * CHUNK, 8)]
    barriers = 2 * (keys + values + factors + A_STAGES) + 2
    return carve(*rest, start=carve(*tiles, align=1024)) + barriers * BARRIER


def walk_launch(
    problem: Problem,
    *,
    math: int,
    segments: int = 1,
    transfer: bool = False,
    initial: str | None = "initial_state",
    final: str = "final_state",
) -> Launch:
    """The walk over the chunks, factors included, of a sequence's segments at once.

    `math` is the number of 64-channel slices of values per block. With `transfer`, of all segments
    but the last, from zero into `final` and from the identity into "segment_p".
    """
    p = problem
    walked = segments - 1 if transfer else segments
    gate = p.g is not None
    slices = -(-p.V // (64 * math)) + (-(-p.K // (64 * math)) if transfer else 0)
    cluster = CLUSTER if transfer and slices % CLUSTER == 0 else 1
    solvers = 1 if cluster > 1 else 3 - math
    stages = CLUSTER_STAGES if cluster > 1 else STAGES[math]
    defines = variant(
        p,
        CHUNK,
        STATE_VK=int(p.state_layout == "vk"),
        SEGMENTS=segments,
        TRANSFER=int(transfer),
        MATH=math,
        SOLVERS=solvers,
        CLUSTER=cluster,
        KEY_STAGES=stages[0],
        VALUE_STAGES=stages[1],
        FACTOR_STAGES=stages[2],
    )
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)
    arguments = (
        box(normal(p, "q"), keys),
        box(normal(p, "k"), keys),
        box("v", values),
        box("o", values, WARP_CHANNELS),
        "beta",
        "g",
        initial,
        "cu_seqlens",
        "o",
        final,
        "segment_p" if transfer else None,
        np.float32(p.scale),
        i32(p.T),
        i32(p.H),
        i32(p.HV),
    )
    return Launch(
        "forward_hopper.cu",
        "forward_hopper",
        defines,
        p.N * walked * p.HV * slices,
        128 * (1 + math + solvers),
        walk_shared(p.K, math, solvers, gate, not transfer, stages),
        arguments,
        arch="sm_90a",
    )
