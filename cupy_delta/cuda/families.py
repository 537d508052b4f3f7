"""Families of kernels: which computes what, and what none does.

The only place that asks for an architecture, and the only table of what is refused: errors and
`support` are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from ..arrays import FLOAT_DTYPES
from ..call import Call
from ..raw import RawBeta, RawGate
from . import sm90
from .architectures import ARCHITECTURES
from .portable import backward, forward, pieces
from .spec import DeviceFacts, Halves, Plan, Tells
from .tokens import recurrent, step

MAX_HEAD = 256
CHUNKS = (16, 32, 64)


class Family(NamedTuple):
    """Kernels that are planned together: for which calls, and a plan for each operation.

    `halves` are plans for sequences that go on elsewhere.
    """

    name: str
    supports: Callable[[str, Call, DeviceFacts], bool]
    plans: Mapping[str, Callable[[Call, DeviceFacts], Plan]]
    halves: Mapping[str, Callable[[Call, DeviceFacts, Tells], Halves]] = MappingProxyType({})


def _always(operation: str, call: Call, facts: DeviceFacts) -> bool:
    return True


# The first one that supports a call computes it.
FAMILIES = (
    Family(
        "sm90",
        sm90.tiles.supports,
        {
            "forward": sm90.forward.plan_forward,
            "training": sm90.training.plan_training,
            "backward": sm90.backward.plan_backward,
            "transfer": sm90.shares.plan_transfer,
        },
        {
            "forward": sm90.shares.halve_forward,
            "training": sm90.shares.halve_training,
            "backward": sm90.shares.halve_backward,
        },
    ),
    Family(
        "sm90",
        sm90.tiles.supports_channels,
        {
            "forward": sm90.channel.plan_forward,
            "training": sm90.channel.plan_training,
            "backward": sm90.channel.plan_backward,
        },
    ),
    Family(
        "portable",
        _always,
        {
            "forward": forward.plan_forward,
            "training": forward.plan_training,
            "backward": backward.plan_backward,
            "wy_factors": pieces.plan_wy_factors,
            "state_pass": pieces.plan_state_pass,
            "chunk_output": pieces.plan_chunk_output,
            "transfer": pieces.plan_transfer,
        },
    ),
    Family(
        "tokens",
        _always,
        {"recurrent": recurrent.plan_recurrent, "step": step.plan_step},
    ),
)
TOKENS = ("recurrent", "step")
CHUNKED = tuple(FAMILIES[2].plans)


class Limit(NamedTuple):
    """What no family does: for which operations, when, and an error that says what would work."""

    operations: tuple[str, ...]
    refuses: Callable[[Call], bool]
    message: str  # may name sizes and options, as {call.K}


LIMITS = (
    Limit(
        (*CHUNKED, *TOKENS),
        lambda call: call.T >= 2**31,
        "T = {call.T}: CuPy arrays support fewer than 2**31 tokens along T",
    ),
    Limit(
        (*CHUNKED, *TOKENS),
        lambda call: call.K > MAX_HEAD,
        f"K = {{call.K}}: CuPy arrays support head sizes up to {MAX_HEAD}; NumPy arrays any",
    ),
    Limit(
        (*CHUNKED, *TOKENS),
        lambda call: call.V > MAX_HEAD,
        f"V = {{call.V}}: CuPy arrays support head sizes up to {MAX_HEAD}; NumPy arrays any",
    ),
    Limit(
        CHUNKED,
        lambda call: call.dtype.name == "float64",
        "float64: the chunked operators on CuPy arrays take float32, float16 and bfloat16;"
        " recurrent_delta_rule and delta_rule_step take float64",
    ),
    Limit(
        CHUNKED,
        lambda call: call.chunk_size not in (None, *CHUNKS),
        "chunk_size = {call.chunk_size}: CuPy arrays support 16, 32 and 64, or None",
    ),
)


def refusal(operation: str, call: Call) -> str | None:
    """Return why no family computes an operation for a call, or None if one does."""
    for limit in LIMITS:
        if operation in limit.operations and limit.refuses(call):
            return limit.message.format(call=call)
    return None


def family_for(operation: str, call: Call, facts: DeviceFacts) -> Family:
    """Return the family that computes an operation for a call; raise `NotImplementedError`."""
    if message := refusal(operation, call):
        raise NotImplementedError(message)
    return next(
        family
        for family in FAMILIES
        if operation in family.plans and family.supports(operation, call, facts)
    )


# ---- the table, for documents and `info` ---------------------------------------------------------

# What is asked for beside a call of 16-bit arrays, and what the operators' own checks keep it from.
OPTIONS: dict[str, dict] = {
    "float16, bfloat16": dict(),
    "float32": dict(dtype=FLOAT_DTYPES["float32"]),
    "float64": dict(dtype=FLOAT_DTYPES["float64"]),
    "g of (B, T, HV)": dict(gate="scalar"),
    "g of (B, T, HV, K)": dict(gate="channel"),
    "SoftplusGate, SigmoidGate": dict(
        gate="scalar", raw_gate=RawGate("softplus", FLOAT_DTYPES["bfloat16"], "head", 0.0)
    ),
    "SigmoidBeta": dict(raw_beta=RawBeta(FLOAT_DTYPES["bfloat16"], 1.0)),
    "beta of (B, T, HV, V)": dict(beta_per_value=True),
    "cu_seqlens": dict(varlen=True),
    "state, a pool": dict(
        pool_slots=8, pool_dtype=FLOAT_DTYPES["bfloat16"], pool_stride=8 * 128**2
    ),
    "accepted": dict(accepting=True),
    "checkpoint_every": dict(checkpoint_every=64),
    "qk_l2norm": dict(qk_l2norm=True),
    'state_layout="vk"': dict(state_layout="vk"),
    "chunk_size of 16 or 32": dict(chunk_size=16),
    "chunk_size of 64": dict(chunk_size=64),
    "other chunk_size than 16, 32, 64": dict(chunk_size=48),
    "K of 129 to 256": dict(K=256),
    "K or V above 256": dict(V=512),
}
PIECES = ("wy_factors", "state_pass", "chunk_output")
SIZED = ("forward", "training", "backward", *PIECES)
TAKEN_BY = {
    "beta of (B, T, HV, V)": ("recurrent",),
    "cu_seqlens": (*CHUNKED, *TOKENS),
    "accepted": ("step",),
    "state, a pool": ("forward", "step"),
    "checkpoint_every": ("forward",),
    "SigmoidBeta": ("forward", "training", "backward", "wy_factors", "transfer", *TOKENS),
    'state_layout="vk"': ("forward", "training", "backward", *TOKENS),
    "chunk_size of 16 or 32": SIZED,
    "chunk_size of 64": SIZED,
    "other chunk_size than 16, 32, 64": SIZED,
}


class Support(NamedTuple):
    """One cell of the table: the family that computes it, or why none does."""

    operation: str
    option: str
    architecture: str
    family: str | None
    refusal: str | None


def support(architectures: tuple[str, ...] = ("sm_80", "sm_90")) -> list[Support]:
    """Return what computes each operation with each of `OPTIONS`, by asking for it.

    Options that an operator does not have are left out. `architectures` are some of
    `ARCHITECTURES`: those of one family of kernels have the same rows.
    """
    plain = Call(dtype=FLOAT_DTYPES["bfloat16"], B=1, T=4096, N=1, H=8, HV=8, K=128, V=128)
    cells = []
    for operation in (*CHUNKED, *TOKENS):
        for option, fields in OPTIONS.items():
            if operation not in TAKEN_BY.get(option, (operation,)):
                continue
            call = replace(plain, **fields)
            why = refusal(operation, call)
            for architecture in architectures:
                facts = ARCHITECTURES[architecture]
                name = None if why else family_for(operation, call, facts).name
                cells.append(Support(operation, option, architecture, name, why))
    return cells


def unsupported() -> list[str]:
    """Return what CuPy arrays refuse, each in a few words."""
    cells = support(("sm_80",))
    lines = []
    for option in OPTIONS:
        taken = {c.operation for c in cells if c.option == option}
        refused = {c.operation for c in cells if c.option == option and c.refusal}
        if refused == taken:
            lines.append(option)
        elif refused <= {"training", "backward"} and refused:
            lines.append(f"{option} in gradients")
        elif refused <= set(TOKENS) and refused:
            lines.append(f"{option} token by token")
        elif refused:
            lines.append(f"{option} in chunks")
    return lines
