"""The launches of the kernels for compute capability 9.0, and when they are the ones to use."""

from __future__ import annotations

from collections.abc import Iterator
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
BARRIER, JOIN_BARRIERS = 8, 5
A_STAGES = 2
# Microseconds on an H100: per chunk of a walk with one or two slices per block and of a transfer;
# of one more launch, and of a walk for every segment that it joins.
WALK = {1: 1.68, 2: 2.45}
TRANSFER = {1: 1.25, 2: 1.47}
LAUNCH, JOIN = 4.0, 2.5
SEGMENTS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
# Buffers of K and Q, of V, of T and P, by slices per block. All fit the 227 KiB of these GPUs.
STAGES = {1: (3, 3, 3), 2: (3, 3, 3)}
# Blocks of a transfer that solve chunks for each other, where their number allows; their buffers.
CLUSTER, CLUSTER_STAGES = 2, (4, 2, 4)


class Division(NamedTuple):
    """How a forward walk is divided.

    Slices of 64 channels per block, segments per sequence, and slices per block of a transfer. With
    `first_math` the first segment, whose state is known, is walked beside the transfers of others,
    with so many slices per block, and has `first_percent` of the others' length.
    """

    math: int
    segments: int = 1
    transfer_math: int = 1
    first_math: int = 0
    first_percent: int = 100


class Part(NamedTuple):
    """The segments of every sequence that one launch walks."""

    segments: int = 1
    first_percent: int = 100
    first: int = 0
    walked: int = 1


WHOLE = Part()


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


def divisions(widths: tuple) -> Iterator[Division]:
    """Yield what `division` chooses from."""
    for math in widths:
        yield Division(math)
        for segments, transfer in product(SEGMENTS[1:], widths):
            yield Division(math, segments, transfer)
            if segments > 2:
                for first in widths:
                    percent = round(100 * TRANSFER[transfer] / WALK[first])
                    yield Division(math, segments, transfer, first, percent)


def division(problem: Problem, facts: DeviceFacts) -> Division:
    """Return the division of a forward walk that takes the least time by the constants above."""
    p = problem
    chunks = max(1, -(-p.B * p.T // (CHUNK * max(1, p.N))))
    pairs = p.N * p.HV
    # With two slices a block's registers do not suffice for the decays of a gate.
    widths = (1,) if p.g is not None or p.V <= BOX else (2, 1)

    def blocks(size: int, math: int) -> int:
        return -(-size // (BOX * math))

    def rounds(count: int) -> int:
        return -(-count // facts.sm_count)

    def cost(d: Division) -> float:
        beside = d.first_math > 0
        length = -(-100 * chunks // (100 * (d.segments - 1) + d.first_percent))
        walked = d.segments - beside
        count = pairs * walked * blocks(p.V, d.math)
        time = rounds(count) * length * WALK[d.math]
        if d.segments > 1:
            slices = blocks(p.V, d.transfer_math) + blocks(p.K, d.transfer_math)
            count = pairs * (walked - 1) * slices
            before = TRANSFER[d.transfer_math] * length
            if beside:
                first = max(0, chunks - (d.segments - 1) * length)
                before = max(before, WALK[d.first_math] * first)
                count += pairs * blocks(p.V, d.first_math)
            time += rounds(count) * before + LAUNCH + JOIN * (walked - 1)
        return time

    return min(divisions(widths), key=cost)


def walk_shared(
    K: int, math: int, solvers: int, gate: bool, output: bool, joins: bool, stages: tuple
) -> int:
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
    barriers = 2 * (keys + values + factors + A_STAGES) + 2 + joins * JOIN_BARRIERS
    return carve(*rest, start=carve(*tiles, align=1024)) + barriers * BARRIER


def segment_arrays(problem: Problem, transferred: int) -> dict:
    """What transfers leave, as hopper/join.cuh has it: H in float, P in 16 bits."""
    p = problem
    keys, values = (-(-size // BOX) * BOX for size in (p.K, p.V))
    return {
        "segment_h": ((p.N, transferred, p.HV, values, keys), p.state_dtype),
        "segment_p": ((p.N * transferred, p.HV, p.K, p.K), p.dtype),
    }


def transfer_box(problem: Problem, transferred: int) -> TensorBox:
    """64 rows and columns of P."""
    shape, _ = segment_arrays(problem, transferred)["segment_p"]
    return TensorBox("segment_p", shape, (1, 1, BOX, BOX))


def forward_launches(problem: Problem, d: Division) -> tuple[list[Launch], dict]:
    """Return the launches of `chunk_delta_rule` as divided, and the arrays between them."""
    if d.segments == 1:
        return [walk_launch(problem, d.math)], {}
    launches, workspace, initial, first = [], {}, "initial_state", 0
    if d.first_math:
        initial, first = "after_first", 1
        workspace["after_first"] = (problem.state_shape, problem.state_dtype)
        head = Part(d.segments, d.first_percent)
        launches.append(walk_launch(problem, d.first_math, head, final=initial, beside=True))
    walked = Part(d.segments, d.first_percent, first, d.segments - first)
    workspace |= segment_arrays(problem, walked.walked - 1)
    launches.append(transfer_launch(problem, d.transfer_math, walked))
    launches.append(walk_launch(problem, d.math, walked, initial=initial))
    return launches, workspace


def transfer_launch(problem: Problem, math: int, walked: Part) -> Launch:
    """What all segments but the last of those that are to be walked do to a state."""
    part = walked._replace(walked=walked.walked - 1)
    return walk_launch(problem, math, part, transfer=True, initial=None, final=None)


def walk_launch(
    problem: Problem,
    math: int,
    part: Part = WHOLE,
    *,
    transfer: bool = False,
    initial: str | None = "initial_state",
    final: str | None = "final_state",
    beside: bool = False,
) -> Launch:
    """The walk over the chunks, factors included, of some of a sequence's segments at once.

    `math` is the number of 64-channel slices of values per block. With `transfer`, from zero and
    from the identity; else from `initial` and, after the first segment of those walked, through
    what transfers have left. A launch that runs `beside` transfers is placed in pairs like them:
    else it would leave them single multiprocessors, which clusters cannot use.
    """
    p = problem
    gate = p.g is not None
    joins = not transfer and part.walked > 1
    slices = -(-p.V // (64 * math)) + (-(-p.K // (64 * math)) if transfer else 0)
    cluster = CLUSTER if transfer and slices % CLUSTER == 0 else 1
    solvers = 1 if cluster > 1 else 3 - math
    stages = CLUSTER_STAGES if cluster > 1 else STAGES[math]
    grid = p.N * part.walked * p.HV * slices
    defines = variant(
        p,
        CHUNK,
        STATE_VK=int(p.state_layout == "vk"),
        SEGMENTS=part.segments,
        FIRST_PERCENT=part.first_percent,
        FIRST=part.first,
        WALKED=part.walked,
        TRANSFER=int(transfer),
        MATH=math,
        SOLVERS=solvers,
        CLUSTER=cluster,
        PLACED=CLUSTER if beside and grid % CLUSTER == 0 else 1,
        KEY_STAGES=stages[0],
        VALUE_STAGES=stages[1],
        FACTOR_STAGES=stages[2],
    )
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)
    transfers = ()
    if transfer or joins:
        transfers = transfer_box(p, part.walked - joins), "segment_h"
    arguments = (
        box(normal(p, "q"), keys),
        box(normal(p, "k"), keys),
        box("v", values),
        box("o", values, WARP_CHANNELS),
        *transfers,
        "beta",
        "g",
        initial,
        "cu_seqlens",
        "o",
        final,
        np.float32(p.scale),
        i32(p.T),
        i32(p.H),
        i32(p.HV),
    )
    return Launch(
        "forward_hopper.cu",
        "forward_hopper",
        defines,
        grid,
        128 * (1 + math + solvers),
        walk_shared(p.K, math, solvers, gate, not transfer, joins, stages),
        arguments,
        arch="sm_90a",
        beside=beside,
    )
