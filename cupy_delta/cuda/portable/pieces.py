"""The building blocks: factors, the state pass, outputs of chunks, and transfers of sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...call import Call
from ...problem import check_chunk_axis
from ..spec import (
    ArraySpecs,
    DeviceFacts,
    Launch,
    Plan,
    carve,
    i32,
    normal,
    padded,
    pitch,
    slots,
    variant,
)
from ..tokens.l2norm import normalised
from .channel_factors import channel_factors_launch
from .choice import choose
from .decays import channel_arrays, decay_arrays, decay_shared, decays_launch
from .factors import wy_factors_launch
from .forward import forward_launch

WRITES = ("k_write", "channel_decays")


def plan_wy_factors(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `wy_factors`."""
    chunk = choose(call, facts).chunk
    launches, workspace = normalised(call, "k")
    if call.gate == "channel":
        # Decays of writes are for transfers, which walk from these factors.
        launches.append(channel_factors_launch(call, chunk, "wu", WRITES))
        workspace |= writes(call, chunk)
    else:
        launches.append(wy_factors_launch(call, chunk, factors=True))
        workspace |= decay_arrays(call, chunk)
    return Plan(tuple(launches), factor_arrays(call, chunk), workspace)


def writes(call: Call, chunk: int) -> dict:
    """Return the arrays that a walk from factors reads of a gate per key channel."""
    return {name: channel_arrays(call, chunk)[name] for name in WRITES}


def factor_arrays(call: Call, chunk: int) -> dict:
    sizes = {"w": call.K, "u": call.V, "t": chunk}
    return {name: ((*call.token_shape, size), call.dtype) for name, size in sizes.items()}


def plan_state_pass(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `state_pass`; chunk slots that no chunk uses are zero."""
    chunk = choose(call, facts).chunk
    outputs = {
        "states": (call.states_shape(chunk), call.state_dtype),
        "v_new": (call.value_shape, call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    launches, workspace = normalised(call, "k")
    if call.gate == "channel":
        launches.append(channel_factors_launch(call, chunk, "rows", WRITES))
        workspace |= writes(call, chunk)
    elif call.gate:
        launches.append(decays_launch(call, chunk))
        workspace |= decay_arrays(call, chunk)
    launches.append(forward_launch(call, chunk, facts, factors=True, states="float", output=None))
    zeroed = ("states",) if call.varlen else ()
    return Plan(tuple(launches), outputs, workspace, zeroed=zeroed)


def plan_chunk_output(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_output`."""
    chunk = choose(call, facts).chunk
    check_chunk_axis(call, chunk)
    launches, workspace = normalised(call, "q", "k")
    if call.gate == "channel":
        launches.append(channel_factors_launch(call, chunk, "p", ("q_read",)))
        workspace["q_read"] = channel_arrays(call, chunk)["q_read"]
        workspace["p"] = ((*call.token_shape, chunk), call.dtype)
    launches.append(chunk_output_launch(call, chunk))
    return Plan(tuple(launches), {"o": (call.value_shape, call.dtype)}, workspace)


def plan_transfer(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `sequence_transfer`: H from the zero state, P from the identity without values."""
    outputs: ArraySpecs = {
        "p": ((call.N, call.HV, call.K, call.K), call.state_dtype),
        "h": ((call.N, call.HV, call.K, call.V), call.state_dtype),
    }
    chunk = choose(call, facts).chunk
    factors = plan_wy_factors(call, facts)
    options: dict[str, Any] = dict(factors=True, output=None, initial=None)
    walks = (
        forward_launch(call, chunk, facts, final="h", **options),
        forward_launch(call, chunk, facts, final="p", zero_v=True, **options),
    )
    return Plan((*factors.launches, *walks), outputs, factors.outputs | factors.workspace)


def chunk_output_launch(call: Call, chunk: int) -> Launch:
    """Outputs of all chunks from their states."""
    size, K, V = call.dtype.itemsize, padded(call.K), padded(call.V)
    slice_, per_channel = min(V, 64), call.gate == "channel"
    rows = (chunk * pitch(K, size), size)
    shared = carve(
        *[rows] * (1 if per_channel else 2),
        (chunk * pitch(slice_, size), size),
        (K * pitch(slice_, size), size),
        (chunk * pitch(chunk, size), size),
        *decay_shared(call, chunk),
    )
    slices = -(-V // slice_)
    return Launch(
        "portable/chunk_output.cu",
        "chunk_output",
        variant(call, chunk, SLICE=slice_),
        slots(call, chunk) * call.HV * slices if call.T else 0,
        128,
        shared,
        (
            "q_read" if per_channel else normal(call, "q"),
            None if per_channel else normal(call, "k"),
            "p" if per_channel else None,
            "v_new",
            "states",
            "g" if call.gate == "scalar" else None,
            "cu_seqlens",
            "o",
            np.float32(call.scale),
            i32(call.N),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )
