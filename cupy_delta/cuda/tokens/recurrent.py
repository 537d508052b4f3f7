"""The recurrence token by token: `tokens/recurrent.cu`."""

from __future__ import annotations

from ...call import Call
from ..spec import C_TYPES, GATES, DeviceFacts, Launch, Plan, i32

# Threads per block, and key channels per thread.
THREADS = 128
KEYS = 32


def plan_recurrent(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `recurrent_delta_rule`."""
    outputs = {
        "o": (call.value_shape, call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    return Plan((recurrent_launch(call),), outputs, sums=call.compute_dtype)


def recurrent_launch(call: Call) -> Launch:
    """All tokens of all sequences."""
    real = call.compute_dtype
    # Threads that share a value channel's keys, up to KEYS each; value channels per block.
    parts = 1
    while parts * KEYS < call.K:
        parts *= 2
    per_warp = 32 // parts
    channels = min(THREADS // parts, -(-call.V // per_warp) * per_warp)
    rows = 3 if call.gate == "channel" else 2
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        HAS_GATE=GATES.index(call.gate),
        VARLEN=int(call.varlen),
        STATE_VK=int(call.state_layout == "vk"),
        L2NORM=int(call.qk_l2norm),
        BETA_PER_VALUE=int(call.beta_per_value),
        PARTS=parts,
        CHANNELS=channels,
    )
    return Launch(
        "tokens/recurrent.cu",
        "recurrent",
        tuple(defines.items()),
        call.N * call.HV * -(-call.V // channels),
        channels * parts,
        2 * rows * call.K * real.itemsize,
        (
            "q",
            "k",
            "v",
            "beta",
            "g",
            "initial_state",
            "cu_seqlens",
            "o",
            "final_state",
            real.type(call.scale),
            i32(call.T),
            i32(call.H),
            i32(call.HV),
        ),
    )
