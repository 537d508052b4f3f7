"""What `chunk_delta_rule_fwd` leaves, on compute capability 9.0: factors, then a walk with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...call import Call
from ..spec import (
    ArraySpecs,
    DeviceFacts,
    Launch,
    Plan,
    TensorBox,
    carve,
    i32,
    normal,
    slots,
    variant,
)
from ..tokens.l2norm import normalised
from . import cost
from .forward import transfer_launch
from .segments import Part, segment_arrays, transfer_box
from .starts import segment_starts_launch, start_arrays
from .tiles import (
    BARRIER,
    BOX,
    CHUNK,
    INVERSE,
    JOIN_BARRIERS,
    TILE,
    box,
    slices_of,
    transfer_slices,
)

DECAY_ROWS = 4  # of a chunk's tokens, as sm90/decays.cuh has them
# Chunks that are loaded ahead, by tiles of value channels per block.
STAGES = {1: 3, 2: 2}
# Of a transfer, which reads neither queries nor P.
TRANSFER_STAGES = {1: 4, 2: 4}
# Chunks before a segment for which it does not pay to look what gates have forgotten.
FEW = 8


def plan_training(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule_fwd`, which leaves what the gradients read."""
    choice = cost.choose_training(call, facts)
    outputs = {
        "o": (call.value_shape, call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    launches, workspace = normalised(call, "q", "k")
    workspace |= core_arrays(call)
    workspace["states"] = (call.states_shape(CHUNK), call.dtype)
    workspace["corrections"] = (call.value_shape, call.dtype)
    launches.append(wy_factors_hopper_launch(call))
    transferred = choice.segments - 1
    begins = early_starts(call, choice)
    if transferred:
        workspace |= segment_arrays(call, transferred) | begins.arrays
        launches += begins.launches
        if call.gate is None:
            part = Part(choice.segments, walked=choice.segments, transferred=transferred)
            launches.append(transfer_launch(call, choice.transfer_tiles, part))
        else:
            launches.append(residuals_transfer_launch(call, choice, begins.starts))
    launches.append(
        forward_residuals_hopper_launch(call, choice, transferred, starts=begins.starts)
    )
    return Plan(tuple(launches), outputs, workspace)


class Begins(NamedTuple):
    """What says where segments may begin from zero: the array's name, and how it is made."""

    starts: str | None
    arrays: ArraySpecs
    launches: tuple[Launch, ...]


ALL_JOIN = Begins(None, {}, ())


def early_starts(call: Call, choice: cost.Choice, *, backward: bool = False) -> Begins:
    """Return where segments may begin from zero, at most half of a segment before their own.

    Not where that is a few chunks: gates hardly forget so fast that it would pay to look.
    """
    most = -(-cost.chunks_per_sequence(call) // choice.segments) // 2
    if call.gate != "scalar" or choice.segments == 1 or most < FEW:
        return ALL_JOIN
    part = Part(choice.segments)
    launch = segment_starts_launch(call, part, most, backward=backward, records=False)
    return Begins("starts", start_arrays(call, choice.segments), (launch,))


def leaves_dv(call: Call) -> bool:
    """Whether the reverse walk leaves dV in place of dY; float16 has no room for a small beta."""
    return call.gate == "scalar" and call.dtype.name == "bfloat16"


def core_arrays(call: Call) -> dict:
    """What factors leave: core, P, and with a gate its decays.

    Without a gate P is the same for all value heads of a key head: it is kept once.
    """
    heads = call.H if call.gate is None else call.HV
    arrays = {
        "core": ((*call.token_shape, CHUNK), call.dtype),
        "p": ((call.B, call.T, heads, CHUNK), call.dtype),
    }
    if call.gate == "scalar":
        rows = (slots(call, CHUNK), call.HV, DECAY_ROWS, CHUNK)
        arrays["decays"] = (rows, np.dtype(np.float32))
    return arrays


def chunk_decays(call: Call) -> str | None:
    return {None: None, "scalar": "decays", "channel": "channel_decays"}[call.gate]


def factors_shared(K: int, gated: bool) -> int:
    """Return the bytes of shared memory of the factors, as sm90/factors.cu carves them."""
    count, size = TILE
    # Blocks of 32 rows: three of M, and of two cores those on the diagonal or, with a gate, all.
    blocks = 9 if gated else 7
    area = max(2 * -(-K // BOX) * count * size, blocks * INVERSE // 2 * 4)
    return carve((area, 1), (2 * CHUNK, 4), (4 * CHUNK * gated, 8), (1, BARRIER))


def wy_factors_hopper_launch(call: Call) -> Launch:
    """The core and P of every head, all chunks at once."""
    p = call
    keys = (p.B, p.T, p.H, p.K)
    return Launch(
        "sm90/factors.cu",
        "wy_factors_hopper",
        variant(p, CHUNK),
        slots(p, CHUNK) * p.H,
        128,
        factors_shared(p.K, p.gate is not None),
        (
            box(normal(p, "q"), keys),
            box(normal(p, "k"), keys),
            "beta",
            "g",
            "cu_seqlens",
            "core",
            "p",
            chunk_decays(p),
            i32(p.N),
            i32(p.T),
            i32(p.H),
            i32(p.HV),
        ),
        arch="sm_90a",
    )


def given_walk_shared(
    K: int,
    value_tiles: int,
    stages: int,
    gate: str | None = None,
    *,
    queries: bool = True,
    states: bool = True,
    output: bool = False,
    joins: bool = False,
    marks: bool = False,
) -> int:
    """Return the bytes of shared memory of either walk, as sm90/training/shared.cuh carves them."""
    count, size = TILE
    boxes = -(-K // BOX)
    keys = 1 + queries + (gate == "channel")
    tiles = stages * (keys * boxes + 1 + queries + value_tiles)
    tiles += value_tiles * (states * boxes + output)
    columns = {None: CHUNK, "scalar": 3 * CHUNK, "channel": CHUNK + BOX * boxes}[gate]
    barriers = [(count, BARRIER) for count in (stages, stages, 1)]
    rows = [(stages * columns, 4)] + [(stages, 4)] * marks
    end = carve(*rows, *barriers, start=tiles * count * size)
    return end + joins * JOIN_BARRIERS * BARRIER


def given_walk_launch(
    call: Call,
    file: str,
    entry: str,
    rows: str,
    results: tuple,
    arguments: tuple,
    *,
    tiles: int,
    stages: int,
    segments: int,
    transferred: int,
    transfer: bool = False,
    starts: str | None = None,
) -> Launch:
    """A walk with core and P given: over `rows` of value channels; its `results` leave by TMA."""
    p = call
    walked = transferred if transfer else segments
    joins = segments > 1 and not transfer
    slices = transfer_slices(p, tiles) if transfer else slices_of(p.V, tiles)
    values = (p.B, p.T, p.HV, p.V)
    # A warp stores 16 value channels of 64 key channels.
    state_box = (slots(p, CHUNK), p.HV, p.V, p.K), (1, 1, 16, BOX)
    states = [name for name in results if name in ("states", "dstates")]
    output = "o" in results and not transfer
    maps: tuple = (
        *key_boxes(p),
        box("core", (p.B, p.T, p.HV, CHUNK)),
        box("p", core_arrays(p)["p"][0]),
        box(rows, values),
        *(TensorBox(x, *state_box) if x in states else box(x, values) for x in results),
    )
    if transfer or joins:
        segment_decays = None if p.gate is None else "segment_decays"
        maps += transfer_box(p, transferred), "segment_h", segment_decays
        if p.gate == "scalar":
            maps += (starts,)
    defines = variant(
        p,
        CHUNK,
        STATE_VK=int(p.state_layout == "vk"),
        JOINS=int(joins),
        TRANSFER=int(transfer),
        STATES=int(bool(states) and not transfer),
        MATH=tiles,
        CHUNK_STAGES=stages,
        **(dict(LEAVES_DV=1) if "dv" in results else {}),
    )
    sizes = (np.float32(p.scale), i32(p.T), i32(p.H), i32(p.HV), i32(segments), i32(transferred))
    return Launch(
        file,
        entry,
        defines,
        p.N * walked * p.HV * slices,
        384 if tiles == 2 else 160,
        given_walk_shared(
            p.K,
            tiles,
            stages,
            p.gate,
            queries=output or "o" not in results,
            states=bool(states) or transfer,
            output=output and bool(states),
            joins=joins,
            marks="dv" in results,
        ),
        (*maps, "beta", chunk_decays(p), *arguments, *sizes),
        arch="sm_90a",
    )


def key_boxes(call: Call) -> tuple[TensorBox, ...]:
    """Tiles of queries and keys; of a gate per key channel, what is read and what is written."""
    p = call
    if p.gate == "channel":
        rows = (p.B, p.T, p.HV, p.K)
        return tuple(box(name, rows) for name in ("q_read", "k_read", "k_write"))
    rows = (p.B, p.T, p.H, p.K)
    return box(normal(p, "q"), rows), box(normal(p, "k"), rows)


def residuals_transfer_launch(call: Call, choice: cost.Choice, starts: str | None) -> Launch:
    """What its segments do to a state, with a gate per head, from the same factors."""
    return given_walk_launch(
        call,
        "sm90/training.cu",
        "forward_residuals_hopper",
        "v",
        ("o",),
        (None, "cu_seqlens", "o", None, None),
        tiles=choice.transfer_tiles,
        stages=TRANSFER_STAGES[choice.transfer_tiles],
        segments=choice.segments,
        transferred=choice.segments - 1,
        transfer=True,
        starts=starts,
    )


def forward_residuals_hopper_launch(
    call: Call, choice: cost.Choice, transferred: int, starts: str | None = None
) -> Launch:
    """The walk that leaves o, final_state and what the gradients read, after core and P."""
    return given_walk_launch(
        call,
        "sm90/training.cu",
        "forward_residuals_hopper",
        "v",
        ("states", "corrections", "o"),
        ("initial_state", "cu_seqlens", "o", "final_state", "corrections"),
        tiles=choice.value_tiles,
        stages=STAGES[choice.value_tiles],
        segments=choice.segments,
        transferred=transferred,
        starts=starts,
    )
