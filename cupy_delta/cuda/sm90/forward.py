"""`chunk_delta_rule` on compute capability 9.0, in one kernel but for transfers of segments."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...call import Call
from ..spec import (
    DeviceFacts,
    Launch,
    Plan,
    carve,
    forward_arrays,
    i32,
    normal,
    variant,
)
from ..tokens.l2norm import normalised
from ..tokens.pool import pool_arguments, pool_macros
from . import cost
from .gates import token_factors_launch
from .segments import WHOLE, Part, kept_box, record_arrays, segment_arrays, transfer_box
from .starts import segment_starts_launch, start_arrays
from .tiles import (
    BARRIER,
    BOX,
    CHUNK,
    CLUSTER,
    INVERSE,
    JOIN_BARRIERS,
    TILE,
    TOKEN_WORDS,
    box,
    slices_of,
    transfer_cluster,
    transfer_slices,
)

A_STAGES = 2
# Buffers of K and Q, of V, of X and P, by tiles per block. All fit the 227 KiB of these GPUs.
STAGES = {1: (3, 3, 3), 2: (3, 3, 3)}
GATED_STAGES = {1: (3, 3, 3), 2: (3, 2, 3)}
# Of a transfer whose blocks solve chunks for each other.
CLUSTER_STAGES = (4, 2, 4)


def plan_forward(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule`."""
    outputs = forward_arrays(call, CHUNK)
    launches, workspace = normalised(call, "q", "k")
    choice = cost.choose_forward(call, facts)
    if call.gate is not None:
        launches.append(token_factors_launch(call, call.raw_gate, call.raw_beta))
        workspace |= record_arrays(call)
    walks, between = walks_of(call, choice)
    return Plan((*launches, *walks), outputs, workspace | between)


def walks_of(call: Call, choice: cost.Choice) -> tuple[list[Launch], dict]:
    """Return the launches of `chunk_delta_rule` as divided, and the arrays between them."""
    tiles, segments, reuse_x = choice.value_tiles, choice.segments, choice.reuse_x
    part = Part(segments, choice.first_percent, choice.last_percent, 0, segments, segments - 1)
    head, workspace = late_walks(call, choice.late, part) if choice.late else ([], {})
    starts = choice.late.segments - 1 if choice.late else 0
    if segments == 1:
        return [*head, forward_hopper_launch(call, tiles, starts=starts)], workspace
    initial = "initial_state"
    if choice.concurrent:
        initial = "after_first"
        workspace[initial] = (call.state_shape, call.state_dtype)
        first = part._replace(walked=1, transferred=0)
        part = part._replace(first=1, walked=segments - 1, transferred=segments - 2)
        width = choice.concurrent
        options: dict[str, Any] = dict(final=initial, concurrent=True, starts=starts)
        head.append(forward_hopper_launch(call, width, first, **options))
    workspace |= segment_arrays(call, part.transferred, reuse_x)
    transfer = transfer_launch(call, choice.transfer_tiles, part, reuse_x, starts)
    walk = forward_hopper_launch(call, tiles, part, initial=initial, reuse_x=reuse_x, starts=starts)
    return [*head, transfer, walk], workspace


def late_walks(call: Call, late: cost.Late, other: Part) -> tuple[list[Launch], dict]:
    """Return the launches for sequences that gates make forget, and what says which these are."""
    part = Part(late.segments, late.first_percent, walked=late.segments)
    starts = late.segments - 1
    launches = [
        segment_starts_launch(call, part, late.most, other=other),
        forward_hopper_launch(call, late.value_tiles, part, starts=starts, late=True),
    ]
    return launches, start_arrays(call, late.segments)


def transfer_launch(
    call: Call, tiles: int, walked: Part, reuse_x: bool = False, starts: int = 0
) -> Launch:
    """What those segments do to a state that have a transfer, of those that are to be walked."""
    part = walked._replace(walked=walked.transferred)
    given: dict[str, Any] = dict(transfer=True, initial=None, final=None)
    return forward_hopper_launch(call, tiles, part, **given, reuse_x=reuse_x, starts=starts)


def forward_hopper_launch(
    call: Call,
    tiles: int,
    part: Part = WHOLE,
    *,
    transfer: bool = False,
    initial: str | None = "initial_state",
    final: str | None = "final_state",
    concurrent: bool = False,
    reuse_x: bool = False,
    starts: int = 0,
    late: bool = False,
) -> Launch:
    """The walk over the chunks, factors included, of some of a sequence's segments at once.

    `tiles` is the number of tiles of 64 value channels per block. With `transfer`, from zero and
    from the identity; else from `initial` and, after the first segment of those walked, through
    what transfers have left; X is kept by these with `reuse_x`. A launch that is `concurrent` with
    transfers is placed in pairs like them: else it would leave them single multiprocessors, which
    clusters cannot use. Where a sequence has `starts`, one is `late`: its segments start from
    nothing, in sequences that others leave to it.
    """
    p = call
    gate = p.gate is not None
    joins = not transfer and part.walked > 1 and not late
    # What a transfer does not read, it is not given.
    queries, output = (normal(p, "k"), "v") if transfer else (normal(p, "q"), "o")
    whole = part.segments == 1 and not transfer
    slices = transfer_slices(p, tiles) if transfer else slices_of(p.V, tiles)
    cluster = transfer_cluster(p, tiles) if transfer else 1
    solvers = 1 if cluster > 1 else 3 - tiles
    stages = CLUSTER_STAGES if cluster > 1 else (GATED_STAGES if gate else STAGES)[tiles]
    grid = p.N * part.walked * p.HV * slices
    warpgroups = 1 + tiles + solvers
    looks = gate and p.dtype.name != "float16"
    choosing_warps = 4 * warpgroups if looks else 0
    defines = variant(
        p,
        CHUNK,
        STATE_VK=int(p.state_layout == "vk"),
        TRANSFER=int(transfer),
        JOINS=int(joins),
        KEPT=int(reuse_x),
        MATH=tiles,
        SOLVERS=solvers,
        CLUSTER=cluster,
        PLACED=CLUSTER if concurrent and grid % CLUSTER == 0 else 1,
        KEY_STAGES=stages[0],
        VALUE_STAGES=stages[1],
        FACTOR_STAGES=stages[2],
        **(dict(CHECKPOINTS=1) if p.checkpoint_every else {}),
        **(pool_macros(p) if whole else {}),
        **(dict(STARTS=1 + late) if starts else {}),
    )
    keys, values = (p.B, p.T, p.H, p.K), (p.B, p.T, p.HV, p.V)
    transfers: tuple = ()
    if transfer or joins:
        decays = "segment_decays" if gate else None
        transfers = transfer_box(p, part.transferred), "segment_h", decays
    if reuse_x:
        transfers += (kept_box(p),)
    if p.checkpoint_every:
        transfers += "checkpoints", i32(p.checkpoint_every)
    if whole and p.pool_dtype is not None:
        transfers += pool_arguments(p)
        initial = final = None
    arguments = (
        box(queries, keys),
        box(normal(p, "k"), keys),
        box("v", values),
        box(output, values),
        *transfers,
        *(("paired_heads",) if gate and tiles == 2 and not (transfer or joins) else ()),
        *(("starts", i32(starts)) if starts else ()),
        None if gate else "beta",
        "token_factors" if gate else None,
        initial,
        "cu_seqlens",
        None if transfer else "o",
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
        128 * warpgroups,
        forward_shared(p.K, tiles, gate, not transfer, joins, stages, choosing_warps),
        arguments,
        arch="sm_90a",
        concurrent=concurrent,
    )


def forward_shared(
    K: int,
    value_tiles: int,
    gate: bool,
    output: bool,
    joins: bool,
    stages: tuple,
    choosing_warps: int = 0,
) -> int:
    """Return the bytes of shared memory of a walk, as sm90/forward.cu carves them."""
    keys, values, factors = stages
    count, size = TILE
    boxes = -(-K // BOX)
    tiles = [(keys * boxes * (1 + output) * count, size)]
    if output:
        tiles += [(value_tiles * count, size), (factors * count, size)]
    tiles += [(values * value_tiles * count, size), (factors * count, size)]
    words = TOKEN_WORDS if gate else CHUNK
    rest = [(A_STAGES * INVERSE, 4), (keys * words, 4)]
    barriers = 2 * (keys + values + factors + A_STAGES + output) + 2 + joins * JOIN_BARRIERS
    end = carve(*rest, start=carve(*tiles, align=1024)) + barriers * BARRIER
    return carve((choosing_warps, 4), start=end) if choosing_warps else end
