"""The walk over the chunks, and over segments of long sequences at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...call import Call
from ..spec import (
    C_TYPES,
    DeviceFacts,
    Launch,
    Plan,
    carve,
    forward_arrays,
    i32,
    padded,
    pitch,
    variant,
)
from ..tokens.l2norm import normalised
from ..tokens.pool import pool_arguments, pool_macros
from .choice import Choice, choose, walk_shape
from .decays import channel_written, decay_arrays, decays_of, read_rows, walk_decay_shared
from .factors import core_launch


def plan_forward(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule`."""
    return walked(call, facts, choose(call, facts))


def plan_training(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_delta_rule_fwd`, which leaves what the gradients read."""
    return walked(call, facts, choose(call, facts), residuals=True)


def walked(call: Call, facts: DeviceFacts, choice: Choice, residuals: bool = False) -> Plan:
    """Plan factors and the walk, of segments at once if there are several."""
    chunk, segments = choice
    outputs = forward_arrays(call, chunk)
    launches, workspace = normalised(call, "q", "k")
    workspace["core"] = workspace["p"] = ((*call.token_shape, chunk), call.dtype)
    workspace |= decay_arrays(call, chunk)
    states = None
    if residuals:
        states = C_TYPES[call.dtype.name]
        workspace["states"] = (call.states_shape(chunk), call.dtype)
        workspace["corrections"] = (call.value_shape, call.dtype)
    launches.append(core_launch(call, chunk))
    initial = "initial_state"
    if segments > 1:
        initial = "entering"
        workspace |= cut_arrays(call, segments)
        cut: dict[str, Any] = dict(segments=segments, transfer=True, output=None, initial=None)
        launches += [
            forward_launch(call, chunk, facts, final="segment_h", **cut),
            forward_launch(call, chunk, facts, final="segment_p", zero_v=True, **cut),
            segment_states_launch(call, segments),
        ]
    whole: dict[str, Any] = dict(segments=segments, states=states, initial=initial)
    if segments == 1 and call.pool_dtype is not None and not residuals:
        whole |= dict(pooled=True, initial=None, final=None)
    launches.append(forward_launch(call, chunk, facts, **whole))
    return Plan(tuple(launches), outputs, workspace)


def cut_arrays(call: Call, segments: int) -> dict:
    N, heads = call.N, call.state_shape[1:]
    square = (call.HV, call.K, call.K)
    shapes = {
        "segment_h": (N, segments - 1, *heads),
        "segment_p": (N, segments - 1, *square),
        "entering": (N, segments, *heads),
    }
    return {name: (shape, call.state_dtype) for name, shape in shapes.items()}


def segment_states_launch(call: Call, segments: int) -> Launch:
    """The states that enter all segments, from the transfers of all but the last."""
    defines = dict(
        HEAD_K=call.K,
        HEAD_V=call.V,
        SEGMENTS=segments,
        STATE_VK=int(call.state_layout == "vk"),
    )
    columns = (padded(call.K) * 8, 4)
    return Launch(
        "portable/segment_states.cu",
        "segment_states",
        tuple(defines.items()),
        call.N * call.HV * -(-call.V // 8),
        128,
        carve(columns, columns),
        ("initial_state", "segment_p", "segment_h", "entering", i32(call.HV)),
    )


def forward_launch(
    call: Call,
    chunk: int,
    facts: DeviceFacts,
    *,
    factors: bool = False,
    zero_v: bool = False,
    segments: int = 1,
    transfer: bool = False,
    states: str | None = None,
    output: str | None = "o",
    initial: str | None = "initial_state",
    final: str | None = "final_state",
    pooled: bool = False,
) -> Launch:
    """The walk over the chunks, of a sequence's segments at once.

    With `transfer` of all segments but the last, from zero, or with `zero_v` from the identity.
    `states` is the C type of written states, or None. With `pooled`, states come from slots of a
    pool and go to them.
    """
    walked = segments - 1 if transfer else segments
    size, K = call.dtype.itemsize, padded(call.K)
    V = call.K if zero_v else call.V
    # Registers are short for two tiles where the walk decays the states that it writes.
    tiles = 1 if K > 64 or (call.gate and states) else 2
    row_tiles, warps = walk_shape(call, V, chunk, facts, tiles, walked)
    slice_ = 16 * row_tiles * warps
    square = (chunk * pitch(chunk, size), size)
    key_rows = (chunk * pitch(K, size), size)
    stage = [key_rows, (chunk * pitch(slice_, size), size)]
    if not transfer:
        stage.append(key_rows)
    if not factors:
        stage += [square, (chunk, 4)]
    if not factors and not transfer:
        stage.append(square)
    stage += walk_decay_shared(call, chunk)
    # With a gate per key channel the rows that are written are one tile for both stages.
    late = [key_rows] if call.gate == "channel" and not factors else []
    shared = carve(*stage, *stage, *late)
    defines = variant(
        call,
        chunk,
        HEAD_V=V,
        STATE_VK=int(call.state_layout == "vk" and not zero_v),
        FROM_FACTORS=int(factors),
        ZERO_V=int(zero_v),
        SEGMENTS=segments,
        TRANSFER=int(transfer),
        WRITE_STATES=int(states is not None),
        STATES_DTYPE=states or "float",
        WARPS=warps,
        ROW_TILES=row_tiles,
        **(dict(CHECKPOINTS=1) if call.checkpoint_every else {}),
        **(pool_macros(call) if pooled else {}),
    )
    kept: tuple = ("checkpoints", i32(call.checkpoint_every)) if call.checkpoint_every else ()
    if pooled:
        kept += pool_arguments(call)
    return Launch(
        "portable/forward.cu",
        "forward",
        defines,
        call.N * walked * call.HV * -(-padded(V) // slice_),
        32 * warps,
        shared,
        (
            "w" if factors else read_rows(call, "q"),
            None if factors and call.gate == "channel" else read_rows(call, "k"),
            None if zero_v else ("u" if factors else "v"),
            None if factors else "core",
            None if factors else "p",
            None if factors else "beta",
            decays_of(call),
            *channel_written(call),
            *kept,
            initial,
            "cu_seqlens",
            output,
            final,
            "states" if states else None,
            ("v_new" if factors else "corrections") if states else None,
            np.float32(call.scale),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )
