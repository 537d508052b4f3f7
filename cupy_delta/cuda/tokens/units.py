"""Gradients of float16 in units of powers of two: `tokens/gradient_*.cu` around a backward.

The backward is linear in the gradients that enter it. Float16 keeps their digits only while they
are of ordinary size, so the heads that have others are computed in a unit, and come back from it.
"""

from __future__ import annotations

from dataclasses import replace

from ...call import Call
from ..spec import C_TYPES, GATES, SUMS, Launch, Plan, TensorBox, carve, i32, slots

CHUNK = 64
GRADIENTS = ("dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
SCALED = {"do": "do_scaled", "dfinal_state": "dfinal_scaled"}


def in_units(backward: Plan, call: Call) -> Plan:
    """Return the plan of a backward, with what enters it and what leaves it in units."""
    rows = slots(call, CHUNK) * call.H if call.T else 0
    workspace = {
        "sizes": ((slots(call, CHUNK), call.H), SUMS),
        "units": ((call.N, call.H), SUMS),
        "do_scaled": (call.value_shape, call.dtype),
        "dfinal_scaled": (call.state_shape, call.state_dtype),
    }
    launches = (
        gradient_sizes_launch(call, rows),
        gradient_units_launch(call),
        gradient_scale_launch(call, rows),
        *(_renamed(launch) for launch in backward.launches),
        gradient_unscale_launch(call, rows, backward),
    )
    return replace(backward, launches=launches, workspace=backward.workspace | workspace)


def gradient_sizes_launch(call: Call, rows: int) -> Launch:
    """The largest of dO in every chunk and key head."""
    arguments = ("do", "cu_seqlens", "sizes", "N", "T", "H")
    return _launch(
        call, "gradient_sizes", rows, 256, arguments, tables=1, unused=("HEAD_K", "HAS_GATE")
    )


def gradient_units_launch(call: Call) -> Launch:
    """The unit of every sequence and key head, and the final state's gradient in it."""
    arguments = ("sizes", "dfinal_state", "cu_seqlens", "units", "dfinal_scaled", "T", "H")
    heads = call.N * call.H
    return _launch(
        call, "gradient_units", heads, 512, arguments, tables=2, unused=("DTYPE", "HAS_GATE")
    )


def gradient_scale_launch(call: Call, rows: int) -> Launch:
    """dO in units."""
    arguments = ("units", "cu_seqlens", "do", "do_scaled", "N", "T", "H")
    return _launch(call, "gradient_scale", rows, 256, arguments, unused=("HEAD_K", "HAS_GATE"))


def gradient_unscale_launch(call: Call, rows: int, backward: Plan) -> Launch:
    """The gradients of a backward out of units, in place."""
    gradients = (name for name in GRADIENTS if name in backward.outputs)
    arguments = ("units", "cu_seqlens", *gradients, i32(rows), "N", "T", "H")
    return _launch(call, "gradient_unscale", rows + call.N * call.H, 256, arguments)


def _launch(
    call: Call,
    entry: str,
    grid: int,
    block: int,
    arguments: tuple,
    *,
    tables: int = 0,
    unused: tuple[str, ...] = (),
) -> Launch:
    """Make a launch; `tables` hold a float per warp. N, T and H are those of the call."""
    defines = dict(
        DTYPE=C_TYPES[call.dtype.name],
        HEAD_K=call.K,
        HEAD_V=call.V,
        GROUP=call.groups,
        CHUNK=CHUNK,
        HAS_GATE=GATES.index(call.gate),
        VARLEN=int(call.varlen),
    )
    return Launch(
        f"tokens/{entry}.cu",
        entry,
        tuple((name, value) for name, value in defines.items() if name not in unused),
        grid,
        block,
        carve(*[(block // 32, 4)] * tables),
        tuple(i32(getattr(call, a)) if a in ("N", "T", "H") else a for a in arguments),
    )


def _renamed(launch: Launch) -> Launch:
    """Give a launch the gradients in units."""

    def other(argument):
        if isinstance(argument, TensorBox):
            return replace(argument, name=SCALED.get(argument.name, argument.name))
        return SCALED.get(argument, argument) if isinstance(argument, str) else argument

    return replace(launch, arguments=tuple(map(other, launch.arguments)))
