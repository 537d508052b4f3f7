"""The launches of the kernels for compute capability 9.0, and when they are the ones to use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from ...call import Call
from ..spec import DeviceFacts, Launch, TensorBox, carve, i32, normal, slots, variant

CHUNK = 64
BOX = 64  # elements of 16 bits in a row of a swizzled tile
WARP_CHANNELS = 16  # of the output that a warp sends
TILE = (CHUNK * BOX, 2)
INVERSE = CHUNK * 36
GATE_WORDS = 4 * CHUNK
BARRIER, JOIN_BARRIERS = 8, 5
A_STAGES = 2
# Microseconds on an H100 of one more launch, of a second stream, and of a walk for every segment
# that it joins.
LAUNCH, BESIDE, JOIN = 4.0, 3.0, 1.5
SEGMENTS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
# Buffers of K and Q, of V, of T and P, by slices per block. All fit the 227 KiB of these GPUs.
STAGES = {1: (3, 3, 3), 2: (3, 3, 3)}
GATED_STAGES = {1: (3, 3, 3), 2: (3, 2, 3)}
# Blocks of a transfer that solve chunks for each other, where their number allows; their buffers.
CLUSTER, CLUSTER_STAGES = 2, (4, 2, 4)


class Rates(NamedTuple):
    """Microseconds per chunk, most of them by slices per block.

    Of a walk on all multiprocessors, of one beside transfers, of one with one slice that is given
    T, and of a transfer.
    """

    walk: dict
    beside_walk: dict
    given_walk: float
    transfer: dict


# Measured on an H100; with a gate these are predictions (docs/performance.md).
PLAIN = Rates({1: 1.66, 2: 2.4}, {1: 1.54, 2: 2.4}, 1.27, {1: 1.25, 2: 1.46})
GATED = Rates({1: 1.75, 2: 2.75}, {1: 1.65, 2: 2.75}, 1.35, {1: 1.3, 2: 1.55})


class Division(NamedTuple):
    """How a forward walk is divided.

    Slices of 64 channels per block, segments per sequence, and slices per block of a transfer. With
    `first_math` the first segment, whose state is known, is walked beside the transfers of others,
    with so many slices per block, and has `first_percent` of the others' length. With `kept` the
    walk is given T by the transfers, but for the last segment, which has `last_percent`.
    """

    math: int
    segments: int = 1
    transfer_math: int = 1
    first_math: int = 0
    first_percent: int = 100
    kept: bool = False
    last_percent: int = 100


class Part(NamedTuple):
    """The segments of every sequence that one launch walks, as the kernel's last arguments."""

    segments: int = 1
    first_percent: int = 100
    last_percent: int = 100
    first: int = 0
    walked: int = 1


WHOLE = Part()


def available(call: Call, facts: DeviceFacts) -> bool:
    """Whether the kernel for compute capability 9.0 computes this call's `chunk_delta_rule`."""
    return (
        facts.capability == (9, 0)
        and call.dtype.itemsize == 2
        and call.chunk_size in (None, CHUNK)
        and call.K % 8 == 0
        and call.V % 8 == 0
        and call.K <= 128
        and call.B * call.T > 0
    )


def box(name: str, shape: tuple, channels: int = BOX) -> TensorBox:
    """64 tokens of one head and some of its channels."""
    return TensorBox(name, tuple(shape), (1, CHUNK, 1, channels))


def blocks(size: int, math: int) -> int:
    """Return how many blocks so many channels take."""
    return -(-size // (BOX * math))


def transfer_slices(call: Call, math: int) -> int:
    """Return the blocks per segment and head of a transfer: of H, and of P."""
    return blocks(call.V, math) + blocks(call.K, math)


def transfer_cluster(call: Call, math: int) -> int:
    """Return how many blocks of a transfer solve chunks for each other."""
    return CLUSTER if transfer_slices(call, math) % CLUSTER == 0 else 1


def divisions(call: Call, widths: tuple) -> Iterator[Division]:
    """Yield what `division` chooses from."""
    rates = PLAIN if call.gate is None else GATED
    given_percent = round(100 * rates.given_walk / rates.walk[1])
    for math in widths:
        yield Division(math)
        for segments, transfer in product(SEGMENTS[1:], widths):
            d = Division(math, segments, transfer)
            # Walks with two slices do not wait for their solver: to be given T costs them time.
            if math == 1 and transfer_cluster(call, transfer) > 1:
                d = d._replace(kept=True, last_percent=given_percent)
            yield d
            if segments > 2:
                for first in widths:
                    percent = round(100 * rates.transfer[transfer] / rates.beside_walk[first])
                    yield d._replace(first_math=first, first_percent=percent)


def division(call: Call, facts: DeviceFacts) -> Division:
    """Return the division of a forward walk that takes the least time by the constants above."""
    p = call
    chunks = max(1, -(-p.B * p.T // (CHUNK * max(1, p.N))))
    pairs = p.N * p.HV
    widths = (1,) if p.V <= BOX else (2, 1)
    rates = PLAIN if p.gate is None else GATED

    def rounds(count: int) -> int:
        return -(-count // facts.sm_count)

    def cost(d: Division) -> float:
        walked = d.segments - (d.first_math > 0)
        count = pairs * walked * blocks(p.V, d.math)
        if d.segments == 1:
            return rounds(count) * chunks * rates.walk[d.math]
        length = -(-100 * chunks // (100 * (d.segments - 2) + d.first_percent + d.last_percent))
        time = rounds(count) * length * (rates.given_walk if d.kept else rates.walk[d.math])
        count = pairs * (walked - 1) * transfer_slices(p, d.transfer_math)
        before = rates.transfer[d.transfer_math] * length
        if d.first_math:
            first = max(0, chunks - (d.segments - 2) * length - d.last_percent * length // 100)
            before = max(before, rates.beside_walk[d.first_math] * first)
            count += pairs * blocks(p.V, d.first_math)
            time += BESIDE
        return time + rounds(count) * before + LAUNCH + JOIN * (walked - 1)

    return min(divisions(p, widths), key=cost)


def walk_shared(
    K: int, math: int, solvers: int, gate: bool, output: bool, joins: bool, stages: tuple
) -> int:
    """Return the bytes of shared memory of a walk, as sm90/forward.cu carves them."""
    keys, values, factors = stages
    count, size = TILE
    boxes = -(-K // BOX)
    tiles = [(keys * boxes * (1 + output) * count, size)]
    if output:
        tiles += [(math * count, size), (factors * count, size)]
    tiles += [(values * math * count, size), (factors * count, size)]
    rest = [(A_STAGES * INVERSE, 4), (factors * CHUNK, 4)]
    if gate:
        rest += [(factors * CHUNK, 4), (factors * CHUNK, 4), (solvers * GATE_WORDS, 4)]
    barriers = 2 * (keys + values + factors + A_STAGES) + 2 + joins * JOIN_BARRIERS
    return carve(*rest, start=carve(*tiles, align=1024)) + barriers * BARRIER


def segment_arrays(call: Call, transferred: int, kept: bool = False) -> dict:
    """What transfers leave, as sm90/join.cuh has it: H, P and decays; T if it is `kept`."""
    p = call
    keys, values = (-(-size // BOX) * BOX for size in (p.K, p.V))
    arrays = {
        "segment_h": ((p.N, transferred, p.HV, values, keys), p.state_dtype),
        "segment_p": ((p.N * transferred, p.HV, p.K, p.K), p.dtype),
    }
    if p.gate is not None:
        arrays["segment_decays"] = ((p.N * transferred, p.HV), p.state_dtype)
    if kept:
        arrays["segment_t"] = ((slots(p, CHUNK), p.HV, CHUNK, CHUNK), p.dtype)
    return arrays


def transfer_box(call: Call, transferred: int) -> TensorBox:
    """64 rows and columns of P."""
    shape, _ = segment_arrays(call, transferred)["segment_p"]
    return TensorBox("segment_p", shape, (1, 1, BOX, BOX))


def kept_box(call: Call) -> TensorBox:
    """T of one chunk and value head."""
    shape, _ = segment_arrays(call, 0, kept=True)["segment_t"]
    return TensorBox("segment_t", shape, (1, 1, CHUNK, CHUNK))


def forward_launches(call: Call, d: Division) -> tuple[list[Launch], dict]:
    """Return the launches of `chunk_delta_rule` as divided, and the arrays between them."""
    if d.segments == 1:
        return [walk_launch(call, d.math)], {}
    launches, workspace, initial, first = [], {}, "initial_state", 0
    if d.first_math:
        initial, first = "after_first", 1
        workspace["after_first"] = (call.state_shape, call.state_dtype)
        head = Part(d.segments, d.first_percent, d.last_percent)
        launches.append(walk_launch(call, d.first_math, head, final=initial, beside=True))
    walked = Part(d.segments, d.first_percent, d.last_percent, first, d.segments - first)
    workspace |= segment_arrays(call, walked.walked - 1, d.kept)
    launches.append(transfer_launch(call, d.transfer_math, walked, d.kept))
    launches.append(walk_launch(call, d.math, walked, initial=initial, kept=d.kept))
    return launches, workspace


def transfer_launch(call: Call, math: int, walked: Part, kept: bool = False) -> Launch:
    """What all segments but the last of those that are to be walked do to a state."""
    part = walked._replace(walked=walked.walked - 1)
    return walk_launch(call, math, part, transfer=True, initial=None, final=None, kept=kept)


def walk_launch(
    call: Call,
    math: int,
    part: Part = WHOLE,
    *,
    transfer: bool = False,
    initial: str | None = "initial_state",
    final: str | None = "final_state",
    beside: bool = False,
    kept: bool = False,
) -> Launch:
    """The walk over the chunks, factors included, of some of a sequence's segments at once.

    `math` is the number of 64-channel slices of values per block. With `transfer`, from zero and
    from the identity; else from `initial` and, after the first segment of those walked, through
    what transfers have left; T is `kept` by these, if at all. A launch that runs `beside` transfers
    is placed in pairs like them: else it would leave them single multiprocessors, which clusters
    cannot use.
    """
    p = call
    gate = p.gate is not None
    joins = not transfer and part.walked > 1
    slices = transfer_slices(p, math) if transfer else blocks(p.V, math)
    cluster = transfer_cluster(p, math) if transfer else 1
    solvers = 1 if cluster > 1 else 3 - math
    stages = CLUSTER_STAGES if cluster > 1 else (GATED_STAGES if gate else STAGES)[math]
    grid = p.N * part.walked * p.HV * slices
    defines = variant(
        p,
        CHUNK,
        STATE_VK=int(p.state_layout == "vk"),
        TRANSFER=int(transfer),
        JOINS=int(joins),
        KEPT=int(kept),
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
        decays = "segment_decays" if gate else None
        transfers = transfer_box(p, part.walked - joins), "segment_h", decays
    if kept:
        transfers += (kept_box(p),)
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
        *(i32(x) for x in part),
    )
    return Launch(
        "sm90/forward.cu",
        "forward_hopper",
        defines,
        grid,
        128 * (1 + math + solvers),
        walk_shared(p.K, math, solvers, gate, not transfer, joins, stages),
        arguments,
        arch="sm_90a",
        beside=beside,
    )
