"""A gate per key channel on compute capability 9.0: factors with tiles that hold it, and walks."""

from __future__ import annotations

from ...call import Call
from ..portable.decays import channel_arrays
from ..spec import (
    C_TYPES,
    SUMS,
    ArraySpecs,
    DeviceFacts,
    Launch,
    Plan,
    carve,
    gate_type,
    gates_as_given,
    gradient_arguments,
    gradient_arrays,
    i32,
    normal,
    pitch,
    slots,
    variant,
)
from ..tokens.l2norm import normalised, through_norm
from . import channel_cut, channel_ragged, channel_whole, cost
from .backward import walk_launches
from .segments import segment_arrays
from .tiles import BOX, CHUNK
from .training import core_arrays, given_walk_launch

BLOCKS = 4  # of 16 tokens in a chunk
# Chunks that are loaded ahead, by tiles of value channels per block.
STAGES = {1: 2, 2: 2}
# Without states of chunks, and of a transfer.
OUTPUT_STAGES, TRANSFER_STAGES = {1: 3, 2: 2}, {1: 3, 2: 2}
# Key channels of a block of the gradients, and value channels at a time.
KEYS, SLICE = 64, 64
# Blocks of the gradients that share a multiprocessor, where each goes through many items; dq and dk
# of one, which wait for those of other value heads.
RESIDENT, WAITING = 2, (2, CHUNK, KEYS)


def plan_forward(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule`."""
    walked = channel_walked(call, cost.choose_channel_forward(call, facts))
    common = len(normalised(call, "q", "k")[0])
    if not channel_whole.supports_whole(call):
        return walked
    if call.varlen:
        most = cost.longest_whole(call, facts)
        return channel_ragged.plan_ragged(call, most, walked, common) if most else walked
    plan = channel_whole.plan_whole(call) if cost.takes_whole(call, facts) else walked
    cut = cost.choose_cut(call, facts) if channel_cut.supports_cut(call) else None
    return plan if cut is None else channel_cut.plan_cut(call, cut, plan, common)


def plan_training(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule_fwd`, which leaves what the gradients read."""
    return channel_walked(call, cost.choose_channel_training(call, facts), "states", "corrections")


def channel_walked(call: Call, choice: cost.Choice, *kept: str) -> Plan:
    """Plan factors and the walk, which leaves o, final_state and what is kept."""
    outputs = {
        "o": (call.value_shape, call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    launches, workspace = normalised(call, "q", "k")
    workspace |= core_arrays(call) | channel_arrays(call, CHUNK)
    if kept:
        workspace["states"] = (call.states_shape(CHUNK), call.dtype)
        workspace["corrections"] = (call.value_shape, call.dtype)
    if choice.segments > 1:
        workspace |= segment_arrays(call, choice.segments - 1)
    launches.append(channel_factors_hopper_launch(call))
    launches += channel_walk_launches(call, choice, *kept)
    return Plan(tuple(launches), outputs, workspace, as_given=gates_as_given(call))


def plan_backward(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule_bwd`, from what `plan_training` has left."""
    choice = cost.choose_backward(call, facts)
    outputs, workspace = gradient_arrays(call, CHUNK)
    if choice.segments > 1:
        workspace |= segment_arrays(call, choice.segments - 1)
    gradients = backward_channel_hopper_launch(call, facts)
    workspace |= waiting_arrays(gradients)
    launches = (*walk_launches(call, choice), gradients, *through_norm(call))
    return Plan(launches, outputs, workspace, as_given=gates_as_given(call))


def channel_walk_launches(call: Call, choice: cost.Choice, *kept: str) -> list[Launch]:
    """The forward walk, after transfers of its segments; `kept` are what gradients read."""
    segments = choice.segments
    walk = channel_walk_launch(call, choice.value_tiles, segments, *kept)
    if segments == 1:
        return [walk]
    return [channel_walk_launch(call, choice.transfer_tiles, segments, transfer=True), walk]


def channel_walk_launch(
    call: Call, width: int, segments: int, *kept: str, transfer: bool = False
) -> Launch:
    stages = TRANSFER_STAGES if transfer else STAGES if kept else OUTPUT_STAGES
    final = (None, None) if transfer else ("final_state", kept[1] if kept else None)
    return given_walk_launch(
        call,
        "sm90/training.cu",
        "forward_residuals_hopper",
        "v",
        (*kept, "o"),
        (None if transfer else "initial_state", "cu_seqlens", "o", *final),
        tiles=width,
        stages=stages[width],
        segments=segments,
        transferred=segments - 1,
        transfer=transfer,
    )


def channel_factors_shared(K: int, itemsize: int) -> int:
    """Return the bytes of shared memory, as sm90/channel_factors/gates.cuh carves them."""
    keys = -(-K // BOX) * BOX
    rows = CHUNK * pitch(keys, itemsize), itemsize
    sums = BLOCKS * keys, 4
    return carve((CHUNK * keys, 4), rows, rows, sums, sums, sums, sums, (CHUNK, 4))


def channel_factors_hopper_launch(call: Call) -> Launch:
    """The core, P and the tiles that hold the gate, of every chunk and value head at once."""
    p = call
    return Launch(
        "sm90/channel_factors.cu",
        "channel_factors_hopper",
        variant(p, CHUNK, GATE=gate_type(p)),
        slots(p, CHUNK) * p.HV,
        128,
        channel_factors_shared(p.K, p.dtype.itemsize),
        (
            normal(p, "q"),
            normal(p, "k"),
            "beta",
            "g",
            "cu_seqlens",
            "core",
            "p",
            "k_read",
            "q_read",
            "k_write",
            "channel_decays",
            i32(p.N),
            i32(p.T),
            i32(p.H),
            i32(p.HV),
        ),
        arch="sm_90a",
    )


def backward_channel_shared(itemsize: int) -> int:
    """Return the bytes of shared memory, as sm90/backward_channel/shared.cuh carves them."""
    tile, sums = CHUNK * pitch(KEYS, itemsize) * itemsize, CHUNK * pitch(KEYS, 4) * 4
    state = SLICE * pitch(KEYS, itemsize) * itemsize
    value, pairs = (CHUNK * pitch(n, itemsize) * itemsize for n in (SLICE, CHUNK))
    place = max(2 * state + 3 * value, 3 * tile + 2 * pairs)
    units = BLOCKS * KEYS, 4
    through = BLOCKS * (BLOCKS - 1) // 2 * KEYS, 4
    rows = (tile, 1), (tile, 1), (sums, 1)
    own = (BLOCKS * 96, 16), (BLOCKS * 96, 16)
    return carve(*rows, units, through, units, units, units, *own, (CHUNK, 4), (place, 1))


def waiting_arrays(gradients: Launch) -> ArraySpecs:
    """Return where dq and dk wait, of grouped heads, for those of other value heads."""
    if "waiting" not in gradients.arrays():
        return {}
    return {"waiting": ((gradients.grid, *WAITING), SUMS)}


def backward_channel_hopper_launch(call: Call, facts: DeviceFacts) -> Launch:
    """The chunk-parallel gradients: an item is a chunk, key head and 64 key channels.

    A block has one or, of grouped heads, several one after the other.
    """
    p = call
    grouped = p.groups > 1
    defines = dict(
        DTYPE=C_TYPES[p.dtype.name],
        GATE=gate_type(p),
        HEAD_K=p.K,
        HEAD_V=p.V,
        CHUNK=CHUNK,
        VARLEN=int(p.varlen),
        KEYS=KEYS,
        SLICE=SLICE,
        GROUPED=int(grouped),
    )
    items = slots(p, CHUNK) * p.H * -(-p.K // KEYS)
    return Launch(
        "sm90/backward_channel.cu",
        "backward_channel_hopper",
        tuple(defines.items()),
        min(items, RESIDENT * facts.sm_count) if grouped else items,
        256,
        backward_channel_shared(p.dtype.itemsize),
        gradient_arguments(p, *("waiting", i32(p.groups), i32(items)) * grouped),
        arch="sm_90a",
    )
