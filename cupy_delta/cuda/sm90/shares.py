"""Sequences that go on elsewhere, on compute capability 9.0: transfers first, then walks.

What walks of segments at once need anyway, their transfers, joined over all of them is what a
device's tokens do to a state. So the two halves of an operation share the segments.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from ...call import Call
from ..spec import (
    C_TYPES,
    ArraySpecs,
    DeviceFacts,
    Halves,
    Launch,
    Plan,
    Tells,
    carve,
    gradient_arrays,
    i32,
    slots,
)
from ..tokens.l2norm import normalised, through_norm
from . import cost
from .backward import backward_chunk_hopper_launch, backward_state_hopper_launch
from .forward import forward_hopper_launch, transfer_launch
from .gates import token_factors_launch
from .segments import Part, record_arrays, segment_arrays, transfer_box
from .tiles import BARRIER, BOX, CHUNK, JOIN_BARRIERS, slices_of, transfer_cluster, transfer_slices
from .training import (
    ALL_JOIN,
    core_arrays,
    early_starts,
    forward_residuals_hopper_launch,
    wy_factors_hopper_launch,
)

# On an H200: microseconds of the factors of a chunk and value head, and the part of all
# multiprocessors that draws all of the bandwidth.
FACTORS, DRAWING = 0.01, 0.72
# The transfers of training are those of the forward.
TRAINING = cost.TRAINING._replace(transfer=cost.FORWARD.transfer)


def plan_transfer(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `sequence_transfer`: transfers of segments, joined."""
    outputs = transfer_arrays(call, "p", "h")
    choice = divide(call, facts, cost.FORWARD, "transfer")
    launches, workspace = normalised(call, "k")
    part = Part(choice.segments, walked=choice.segments, transferred=choice.segments)
    workspace |= segment_arrays(call, part.transferred)
    if call.gate is not None:
        workspace |= record_arrays(call)
        launches.append(token_factors_launch(call))
    launches += [
        transfer_launch(call, choice.transfer_tiles, part),
        joined_transfer_hopper_launch(call, part.transferred, None, "p", "h"),
    ]
    return Plan(tuple(launches), outputs, workspace)


def halve_forward(call: Call, facts: DeviceFacts, tells: Tells) -> Halves:
    """Plan `chunk_delta_rule` in halves."""
    choice = divide(call, facts, cost.FORWARD, tells)
    launches, workspace = normalised(call, "q", "k")
    if call.gate is not None:
        launches.append(token_factors_launch(call))
        workspace |= record_arrays(call)
    part = part_of(choice, tells)
    reuse_x = choice.reuse_x and part.walked > 1
    told, between, results = transferred(call, choice, part, tells, reuse_x)
    walk = forward_hopper_launch(call, choice.value_tiles, part, reuse_x=reuse_x)
    return Halves(
        Plan((*launches, *told), results, workspace | between),
        Plan((walk,), forward_outputs(call)),
    )


def halve_training(call: Call, facts: DeviceFacts, tells: Tells) -> Halves:
    """Plan `chunk_delta_rule_fwd` in halves.

    Factors, which nothing that is told depends on, are made while others wait for that, or while
    this device does.
    """
    least, factors_time = cost.traffic(call, written_rows=2), FACTORS * slots(call, CHUNK) * call.HV
    choice = divide(call, facts, TRAINING, tells, least, factors_time)
    launches, workspace = normalised(call, "k")
    part = part_of(choice, tells)
    if call.gate is not None and part.transferred:
        launches.append(token_factors_launch(call))
        workspace |= record_arrays(call)
    told, between, results = transferred(call, choice, part, tells)
    factors, kept = normalised(call, "q")
    factors.append(wy_factors_hopper_launch(call))
    kept |= core_arrays(call)
    kept["states"] = (call.states_shape(CHUNK), call.dtype)
    kept["corrections"] = (call.value_shape, call.dtype)
    walk = forward_residuals_hopper_launch(call, choice, part.transferred)
    first, second = [*launches, *told], [walk]
    if tells == "nothing":
        first += factors
        workspace |= kept
        kept = {}
    else:
        second = [*factors, walk]
    return Halves(
        Plan(tuple(first), results, workspace | between),
        Plan(tuple(second), forward_outputs(call), kept),
    )


def halve_backward(call: Call, facts: DeviceFacts, tells: Tells) -> Halves:
    """Plan `chunk_delta_rule_bwd` in halves; the reverse walk's first segment is the last one."""
    choice = divide(call, facts, cost.BACKWARD, tells, cost.traffic(call, written_rows=1))
    part = part_of(choice, tells)
    outputs, workspace = gradient_arrays(call, CHUNK)
    first: list[Launch] = []
    results: ArraySpecs = {}
    begins = ALL_JOIN
    if part.transferred:
        if tells == "nothing":  # who is told needs what all segments do
            begins = early_starts(call, choice, backward=True)
        workspace |= segment_arrays(call, part.transferred) | begins.arrays
        transfer = backward_state_hopper_launch(call, choice, part.transferred, True, begins.starts)
        first += [*begins.launches, transfer]
    if tells != "nothing":
        results = transfer_arrays(call, "told_p", "told_h")
        start = "dfinal_state" if tells == "state" else None
        first.append(told_launch(call, part.transferred, start))
    second = (
        backward_state_hopper_launch(call, choice, part.transferred, starts=begins.starts),
        backward_chunk_hopper_launch(call, facts),
        *through_norm(call),
    )
    return Halves(Plan(tuple(first), results, workspace), Plan(second, outputs))


# ---- what they have in common --------------------------------------------------------------------


def divide(
    call: Call,
    facts: DeviceFacts,
    rates: cost.Rates,
    tells: Tells,
    least: float = 0.0,
    meanwhile: float = 0.0,
) -> cost.Choice:
    """Choose segments by predicted time: all have a transfer, or all but the last if none is told.

    What is told elsewhere comes after as long as a share of this length takes to tell it, in which
    this one may do what takes `meanwhile`. Walks that wait for memory take `least`, a tenth more
    with narrow blocks, which read keys once more, and more in rounds that few blocks are left for.
    """
    pairs, chunks = call.N * call.HV, cost.chunks_per_sequence(call)

    def rounds(blocks: int) -> int:
        return -(-blocks // facts.sm_count)

    def first_half(choice: cost.Choice, count: int) -> float:
        blocks = pairs * count * transfer_slices(call, choice.transfer_tiles)
        rate = rates.transfer[choice.transfer_tiles] * -(-chunks // choice.segments)
        return rounds(blocks) * rate + cost.JOIN * count

    def second_half(choice: cost.Choice) -> float:
        tiles, blocks = choice.value_tiles, pairs * choice.segments
        blocks *= slices_of(call.V, tiles)
        rate = rates.given_walk if choice.reuse_x else rates.walk[tiles]
        left = blocks % facts.sm_count
        few = max(0.0, DRAWING * facts.sm_count - left) / blocks if left else 0.0
        waits = least * (1.0 + few) * (1.1 if tiles < widest else 1.0)
        time = rounds(blocks) * -(-chunks // choice.segments) * rate
        return max(waits, time) + cost.JOIN * choice.segments

    def time(choice: cost.Choice) -> float:
        if tells == "nothing":
            own = first_half(choice, choice.segments - 1) + meanwhile
            return max(own, others) + second_half(choice)
        return first_half(choice, choice.segments) + second_half(choice)

    widths = (1,) if call.V <= BOX else (2, 1)
    widest = widths[0]
    # Narrow transfers with a gate would spill registers.
    of_transfers = widths if call.gate is None else (widest,)
    choices = [cost.Choice(*x) for x in product(widths, cost.SEGMENTS, of_transfers)]
    others = min(first_half(x, x.segments) for x in choices)
    if rates.given_walk and cost.takes_x(call):
        choices += [
            x._replace(reuse_x=True)
            for x in choices
            if x.value_tiles == 1 and transfer_cluster(call, x.transfer_tiles) > 1
        ]
    return min(choices, key=time)


def part_of(choice: cost.Choice, tells: Tells) -> Part:
    """Return all segments: with all transfers, or without that of the last if none asks for it."""
    count = choice.segments
    return Part(count, walked=count, transferred=count - (tells == "nothing"))


def transferred(
    call: Call, choice: cost.Choice, part: Part, tells: Tells, reuse_x: bool = False
) -> tuple[list[Launch], ArraySpecs, ArraySpecs]:
    """Return the launches of the first half, arrays that they leave, and what is told."""
    if not part.transferred:
        return [], {}, {}
    launches = [transfer_launch(call, choice.transfer_tiles, part, reuse_x)]
    results: ArraySpecs = {}
    if tells != "nothing":
        results = transfer_arrays(call, "told_p", "told_h")
        start = "initial_state" if tells == "state" else None
        launches.append(told_launch(call, part.transferred, start))
    return launches, segment_arrays(call, part.transferred, reuse_x), results


def told_launch(call: Call, transferred: int, start: str | None) -> Launch:
    return joined_transfer_hopper_launch(
        call, transferred, start, "told_p" if start is None else None, "told_h"
    )


def forward_outputs(call: Call) -> ArraySpecs:
    return {
        "o": (call.value_shape, call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }


def transfer_arrays(call: Call, p: str | None, h: str) -> ArraySpecs:
    arrays: ArraySpecs = {h: ((call.N, call.HV, call.K, call.V), call.state_dtype)}
    if p is not None:
        arrays[p] = ((call.N, call.HV, call.K, call.K), call.state_dtype)
    return arrays


def joined_transfer_hopper_launch(
    call: Call, transferred: int, start: str | None, p: str | None, h: str
) -> Launch:
    """What all segments together do to a state; without `p`, to the one that is given."""
    slices = slices_of(call.V, 1) + (slices_of(call.K, 1) if p else 0)
    boxes = -(-call.K // BOX)
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        CHUNK=CHUNK,
        HAS_GATE=int(call.gate is not None),
        VARLEN=0,
        WITH_P=int(p is not None),
    )
    square = ((boxes * BOX) ** 2, 2)
    arguments: tuple[Any, ...] = (
        transfer_box(call, transferred),
        "segment_h",
        None if call.gate is None else "segment_decays",
        start,
        p,
        h,
        i32(call.HV),
        i32(transferred),
    )
    return Launch(
        "sm90/transfer.cu",
        "joined_transfer_hopper",
        tuple(defines.items()),
        call.N * call.HV * slices,
        128,
        carve((JOIN_BARRIERS, BARRIER), start=carve(square, square, align=1024)),
        arguments,
        arch="sm_90a",
    )
