"""The gradients on compute capability 9.0: the reverse walk, and what is chunk-parallel."""

from __future__ import annotations

import numpy as np

from ...call import Call
from ..spec import (
    DeviceFacts,
    Launch,
    Plan,
    TensorBox,
    carve,
    gradient_arrays,
    i32,
    normal,
    slots,
    variant,
)
from ..tokens.l2norm import through_norm
from . import cost
from .segments import segment_arrays
from .tiles import BARRIER, BOX, CHUNK, TILE, box
from .training import chunk_decays, early_starts, given_walk_launch, leaves_dv

# Chunks that the reverse walk loads ahead, by tiles of value channels per block.
WALK_STAGES, CHANNEL_WALK_STAGES = {1: 3, 2: 3}, {1: 2, 2: 2}
THREADS = 384
# Buffers of 64 value channels, by boxes of 64 keys.
STAGES = {1: 4, 2: 3}
# With a gate Q and K come with the first slice, not at the end of a head, and have two buffers.
GATED_STAGES, GATED_KEY_STAGES = {1: 4, 2: 2}, 2
MATH_WARPS = 8


def plan_backward(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule_bwd`, from what `plan_training` has left."""
    choice = cost.choose_backward(call, facts)
    outputs, workspace = gradient_arrays(call, CHUNK)
    if choice.segments > 1:
        workspace |= segment_arrays(call, choice.segments - 1)
        workspace |= early_starts(call, choice, backward=True).arrays
    launches = [
        *walk_launches(call, choice),
        backward_chunk_hopper_launch(call, facts),
        *through_norm(call),
    ]
    return Plan(tuple(launches), outputs, workspace)


def walk_launches(call: Call, choice: cost.Choice) -> list[Launch]:
    """The reverse walk, after transfers of its segments."""
    transferred = choice.segments - 1
    if not transferred:
        return [backward_state_hopper_launch(call, choice, transferred)]
    begins = early_starts(call, choice, backward=True)
    return [
        *begins.launches,
        backward_state_hopper_launch(call, choice, transferred, True, begins.starts),
        backward_state_hopper_launch(call, choice, transferred, starts=begins.starts),
    ]


def backward_state_hopper_launch(
    call: Call,
    choice: cost.Choice,
    transferred: int,
    transfer: bool = False,
    starts: str | None = None,
) -> Launch:
    """The reverse walk: the gradient of the state leaving each chunk, and G."""
    tiles = choice.transfer_tiles if transfer else choice.value_tiles
    start, end = (None, None) if transfer else ("dfinal_state", "dinitial_state")
    # Of tokens with a small beta dY, too.
    rows, small = ("dv", ("dy",)) if leaves_dv(call) and not transfer else ("dy", ())
    return given_walk_launch(
        call,
        "sm90/backward_state.cu",
        "backward_state_hopper",
        "do",
        ("dstates", rows),
        (start, "cu_seqlens", rows, *small, end),
        tiles=tiles,
        stages=(CHANNEL_WALK_STAGES if call.gate == "channel" else WALK_STAGES)[tiles],
        segments=choice.segments,
        transferred=transferred,
        transfer=transfer,
        starts=starts,
    )


def ring_stages(K: int, gated: bool) -> tuple[int, int]:
    """Return the buffers of slices, and of Q and K."""
    boxes = -(-K // BOX)
    return (GATED_STAGES[boxes], GATED_KEY_STAGES) if gated else (STAGES[boxes], 1)


def backward_chunk_shared(K: int, gated: bool, leaves: bool) -> int:
    """Return the bytes of shared memory, as sm90/backward_chunk.cu carves them."""
    boxes = -(-K // BOX)
    stages, key_stages = ring_stages(K, gated)
    count, size = TILE
    keys, square = (key_stages * boxes * count, size), (count, size)
    tiles = carve((stages * (3 + 2 * boxes) * count, size), keys, keys, square, square, align=1024)
    # Two buffers, of beta and with a gate of two rows more, or four.
    rows = [(2 * CHUNK * (1 + 2 * gated + 2 * leaves), 4)]
    if gated:
        # Sums for its gradient: of pairs by each math warp, and three more.
        rows += [((MATH_WARPS + 3) * CHUNK, 4), (MATH_WARPS // 2, 4), (1, BARRIER)]
    barriers = (stages, stages, key_stages, key_stages, 1, 1, 2, *(2, 2) * leaves)
    return carve(*rows, *((count, BARRIER) for count in barriers), start=tiles)


def backward_chunk_hopper_launch(call: Call, facts: DeviceFacts) -> Launch:
    """The chunk-parallel gradients: one block per multiprocessor, for many chunks and key heads."""
    p = call
    gated = p.gate is not None
    slices, key_stages = ring_stages(p.K, gated)
    leaving = dict(LEAVES_DV=1) if leaves_dv(p) else {}
    count = slots(p, CHUNK)
    pairs = count * p.H if p.T else 0
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)

    def states(name: str) -> TensorBox:
        return TensorBox(name, (count, p.HV, p.V, p.K), (1, 1, BOX, BOX))

    arguments = (
        box(normal(p, "q"), keys),
        box(normal(p, "k"), keys),
        box("corrections", values),
        box("dv" if leaves_dv(p) else "dy", values),
        box("do", values),
        states("states"),
        states("dstates"),
        "beta",
        chunk_decays(p),
        "cu_seqlens",
        "dq",
        "dk",
        *(("corrections", "dy") if leaves_dv(p) else ("dv",)),
        "dbeta",
        "dg" if gated else None,
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
        variant(p, CHUNK, SLICE_STAGES=slices, KEY_STAGES=key_stages, **leaving),
        min(pairs, facts.sm_count),
        THREADS,
        backward_chunk_shared(p.K, gated, leaves_dv(p)),
        arguments,
        arch="sm_90a",
    )
