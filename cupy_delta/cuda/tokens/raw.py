"""g and beta formed of logits and parameters, and their gradients: `tokens/raw_*.cu`.

Whatever the kernels of a plan are, these come before those of a forward and after those of a
backward. A plan whose kernels read the logits themselves reads no g or beta, and is left alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ...call import Call
from ..spec import BIASES, C_TYPES, SUMS, ArraySpecs, Launch, Plan, carve, i32, raw_macros

THREADS = 256
# Tokens of a thread that forms gates, at least and where threads abound, and runs that one adds up.
LEAST_ROWS, ROWS = 4, 16
SUM_THREADS, PARTS_PER_THREAD = 1024, 16


def gates_per_head(call: Call) -> int:
    return call.K if call.gate == "channel" else 1


def beta_shape(call: Call) -> tuple[int, ...]:
    return call.value_shape if call.beta_per_value else call.token_shape


def formed(plan: Plan, call: Call, names: tuple[str, ...] = ("g", "beta")) -> Plan:
    """Return a plan that forms what it reads of these, where logits are in their place."""
    read = {name for name, _ in plan.read}.intersection(names)
    launches, workspace = [], {}
    if call.raw_gate is not None and "g" in read:
        launches.append(raw_gate_launch(call, plan.sums))
        workspace["g"] = (call.gate_shape, plan.sums)
    if call.raw_beta is not None and "beta" in read:
        launches.append(raw_beta_launch(call, plan.sums))
        workspace["beta"] = (beta_shape(call), plan.sums)
    return replace(plan, launches=(*launches, *plan.launches), workspace=plan.workspace | workspace)


def through_raw(plan: Plan, call: Call) -> Plan:
    """Return the plan of a backward that carries dg and dbeta on to what these were formed of."""
    launches: list[Launch] = []
    outputs: ArraySpecs = dict(plan.outputs)
    between: ArraySpecs = {}
    if call.raw_gate is not None:
        between["dg"] = outputs.pop("dg")
        between["sums"] = ((gate_parts(call), call.HV, gates_per_head(call), 2), SUMS)
        outputs["da"] = (call.gate_shape, call.raw_gate.dtype)
        outputs["dA_log"] = ((call.HV,), SUMS)
        if call.raw_gate.bias is not None:
            channels = (call.K,) if call.raw_gate.bias == "channel" else ()
            outputs["ddt_bias"] = ((call.HV, *channels), SUMS)
        launches += [raw_gate_gradient_launch(call), raw_gate_sums_launch(call)]
    if call.raw_beta is not None:
        between["dbeta"] = outputs.pop("dbeta")
        outputs["dlogits"] = (beta_shape(call), call.raw_beta.dtype)
        launches.append(raw_beta_gradient_launch(call))
    return replace(
        plan,
        launches=(*plan.launches, *launches),
        outputs=outputs,
        workspace=plan.workspace | between,
    )


class Columns(NamedTuple):
    """Of kernels in which a thread has the same gates of all its tokens: how they are divided.

    A thread has `vector` neighbours, a block `width` threads side by side and `rows` tokens.
    """

    columns: int
    vector: int
    width: int
    rows: int

    @classmethod
    def of(cls, call: Call, real: np.dtype, most_parts: int | None = None) -> Columns:
        """Divide a call's gates into many blocks, or into at most so many parts of its tokens."""
        columns = call.HV * gates_per_head(call)
        vector = math.gcd(columns, 16 // real.itemsize)
        width = width_of(columns // vector, THREADS)
        rows = ROWS if most_parts is None else -(-call.B * call.T // most_parts)
        return cls(columns, vector, width, max(rows, LEAST_ROWS * (THREADS // width)))

    def parts(self, call: Call) -> int:
        """Return the runs of tokens."""
        return -(-call.B * call.T // self.rows)

    def grid(self, call: Call) -> int:
        return self.parts(call) * -(-self.columns // (self.vector * self.width))

    def macros(self, call: Call) -> dict[str, Any]:
        assert call.raw_gate is not None
        return dict(
            A_DTYPE=C_TYPES[call.raw_gate.dtype.name],
            **raw_macros(call.raw_gate),
            CHANNELS=gates_per_head(call),
            VECTOR=self.vector,
            WIDTH=self.width,
        )


def width_of(columns: int, most: int) -> int:
    """Return how many threads are side by side: a power of two."""
    return min(most, 1 << (columns - 1).bit_length())


def raw_gate_launch(call: Call, real: np.dtype) -> Launch:
    """Every g."""
    assert call.raw_gate is not None
    divided = Columns.of(call, real)
    return Launch(
        "tokens/raw_gate.cu",
        "raw_gate",
        (("REAL", C_TYPES[real.name]), *divided.macros(call).items()),
        divided.grid(call),
        THREADS,
        0,
        (
            "a",
            "A_log",
            "dt_bias" if call.raw_gate.bias else None,
            "g",
            real.type(call.raw_gate.bound),
            np.int64(call.B * call.T),
            i32(divided.rows),
            i32(call.HV),
        ),
    )


def raw_beta_launch(call: Call, real: np.dtype) -> Launch:
    """Every beta."""
    assert call.raw_beta is not None
    elements = math.prod(beta_shape(call))
    defines = dict(A_DTYPE=C_TYPES[call.raw_beta.dtype.name], REAL=C_TYPES[real.name])
    return Launch(
        "tokens/raw_beta.cu",
        "raw_beta",
        tuple(defines.items()),
        -(-elements // THREADS),
        THREADS,
        0,
        ("logits", "beta", real.type(call.raw_beta.scale), np.int64(elements)),
    )


def raw_beta_gradient_launch(call: Call) -> Launch:
    """Every gradient of the logits of beta."""
    assert call.raw_beta is not None
    elements = math.prod(beta_shape(call))
    return Launch(
        "tokens/raw_beta_gradient.cu",
        "raw_beta_gradient",
        (("A_DTYPE", C_TYPES[call.raw_beta.dtype.name]),),
        -(-elements // THREADS),
        THREADS,
        0,
        ("logits", "dbeta", "dlogits", SUMS.type(call.raw_beta.scale), np.int64(elements)),
    )


def summed_columns(call: Call) -> Columns:
    """Return how the gradients are divided: in few enough parts for their sums to be quick."""
    lanes = SUM_THREADS // width_of(gates_per_head(call), SUM_THREADS)
    return Columns.of(call, SUMS, most_parts=PARTS_PER_THREAD * lanes)


def gate_parts(call: Call) -> int:
    """Return the runs of tokens whose gradients are added up first."""
    return summed_columns(call).parts(call)


def raw_gate_gradient_launch(call: Call) -> Launch:
    """The gradients of the logits, and sums of those of the parameters."""
    assert call.raw_gate is not None
    divided = summed_columns(call)
    return Launch(
        "tokens/raw_gate_gradient.cu",
        "raw_gate_gradient",
        tuple(divided.macros(call).items()),
        divided.grid(call),
        THREADS,
        carve((THREADS * divided.vector, 8)),
        (
            "a",
            "A_log",
            "dt_bias" if call.raw_gate.bias else None,
            "dg",
            "da",
            "sums",
            SUMS.type(call.raw_gate.bound),
            np.int64(call.B * call.T),
            i32(divided.rows),
            i32(call.HV),
        ),
    )


def raw_gate_sums_launch(call: Call) -> Launch:
    """The gradients of the parameters, from those sums."""
    assert call.raw_gate is not None
    channels = gates_per_head(call)
    defines = dict(
        BIAS=BIASES[call.raw_gate.bias],
        CHANNELS=channels,
        WIDTH=width_of(channels, SUM_THREADS),
    )
    return Launch(
        "tokens/raw_gate_sums.cu",
        "raw_gate_sums",
        tuple(defines.items()),
        call.HV,
        SUM_THREADS,
        carve((SUM_THREADS, 8)),
        (
            "sums",
            "dA_log",
            "ddt_bias" if call.raw_gate.bias else None,
            i32(gate_parts(call)),
            i32(call.HV),
        ),
    )
