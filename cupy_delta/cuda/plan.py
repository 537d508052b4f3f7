"""From a Call and facts of a device to a plan: launches in order, and the arrays they need.

What the kernels do not do is refused here, naming the option and what would work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps

import numpy as np

from ..call import Call
from ..problem import check_chunk_axis
from .portable.backward import backward_chunk_launch, backward_state_launch
from .portable.decode import step_launch
from .portable.factors import gate_sums_launch, wy_factors_launch
from .portable.forward import (
    chunk_output_launch,
    segment_count,
    segment_states_launch,
    walk_launch,
)
from .portable.tokens import affine_launch, norm_launch, token_launch
from .sm90 import backward as sm90_backward
from .sm90 import forward as sm90
from .sm90 import training as sm90_training
from .spec import C_TYPES, DeviceFacts, Launch, normal

MAX_HEAD = 256
SUMS = np.dtype(np.float32)
CHUNKS = (16, 32, 64)
DEFAULT_CHUNK = {"float32": 16, "float16": 32, "bfloat16": 32}


@dataclass(frozen=True, eq=False)
class Plan:
    """Launches in order, and the arrays to make for them: name -> (shape, dtype).

    `sums` is the dtype in which kernels read beta and g.
    """

    launches: tuple
    outputs: dict
    workspace: dict = field(default_factory=dict)
    zeroed: tuple = ()
    sums: np.dtype = SUMS

    @cached_property
    def working(self) -> tuple[Launch, ...]:
        """The launches that have work: a grid of zero would still run one block."""
        return tuple(launch for launch in self.launches if launch.grid)

    @cached_property
    def made(self) -> tuple[tuple[str, tuple, np.dtype], ...]:
        """The arrays to make: name, shape and dtype."""
        return tuple((name, *like) for name, like in (self.workspace | self.outputs).items())

    @cached_property
    def read(self) -> tuple[tuple[str, np.dtype | None], ...]:
        """The arrays that have to be there: name, and dtype to read it in if not its own."""
        names = set().union(*(launch.arrays() for launch in self.launches))
        integers = np.dtype(np.int64)
        dtypes = dict(beta=self.sums, g=self.sums, cu_seqlens=integers, state_indices=integers)
        made = self.workspace.keys() | self.outputs.keys()
        return tuple((name, dtypes.get(name)) for name in sorted(names - made))


def planned(function):
    """Keep what is planned with the call, for all calls that are alike: it holds no array."""

    @wraps(function)
    def lookup(call: Call, *more):
        key = (lookup, *more)
        plan = call.kept.get(key)
        if plan is None:
            plan = call.kept[key] = function(call, *more)
        return plan

    return lookup


# ---- what can be asked for -----------------------------------------------------------------------


def check_sizes(call: Call) -> None:
    if call.T >= 2**31:
        raise NotImplementedError(
            f"T = {call.T}: CuPy arrays support fewer than 2**31 tokens along T"
        )
    for name, size in (("K", call.K), ("V", call.V)):
        if size > MAX_HEAD:
            raise NotImplementedError(
                f"{name} = {size}: CuPy arrays support head sizes up to {MAX_HEAD};"
                " NumPy arrays any"
            )


def check_gate(call: Call) -> None:
    if call.gate == "channel":
        raise NotImplementedError(
            "g: a gate per key channel, (B, T, HV, K), is not supported on CuPy arrays;"
            " a scalar gate (B, T, HV) is, and NumPy arrays support both"
        )


def check_gate_gradients(call: Call) -> None:
    if call.gate is not None:
        raise NotImplementedError(
            "g: gradients through a gate are not supported on CuPy arrays; NumPy arrays support"
            " them, and chunk_delta_rule runs the gate forward"
        )


def chunk_of(call: Call) -> int:
    """Return the chunk size in force, or refuse what the chunked kernels do not do."""
    check_sizes(call)
    check_gate(call)
    if call.dtype.name == "float64":
        raise NotImplementedError(
            "float64: the chunked operators on CuPy arrays take float32, float16 and bfloat16;"
            " recurrent_delta_rule and delta_rule_step take float64"
        )
    if call.chunk_size is None:
        return DEFAULT_CHUNK[call.dtype.name]
    if call.chunk_size not in CHUNKS:
        raise NotImplementedError(
            f"chunk_size = {call.chunk_size}: CuPy arrays support 16, 32 and 64, or None"
        )
    return call.chunk_size


def training_chunk(call: Call, facts: DeviceFacts) -> int:
    """Return the chunk size of the gradients' kernels and of the forward that leaves residuals."""
    chunk = chunk_of(call)
    return sm90.CHUNK if sm90_training.available(call, facts) else chunk


def keys(call: Call) -> tuple[int, ...]:
    return (call.B, call.T, call.H, call.K)


def values(call: Call) -> tuple[int, ...]:
    return (call.B, call.T, call.HV, call.V)


# ---- the operators -------------------------------------------------------------------------------


@planned
def plan_forward(call: Call, facts: DeviceFacts, residuals: bool = False) -> Plan:
    """Plan `chunk_delta_rule`, and with `residuals` what its gradients read."""
    chunk = training_chunk(call, facts) if residuals else chunk_of(call)
    tokens = (call.B, call.T, call.HV)
    outputs = {
        "o": ((*tokens, call.V), call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    launches, workspace = normalised(call, "q", "k")
    if sm90.available(call, facts) and not residuals:
        walks, between = sm90.forward_launches(call, sm90.division(call, facts))
        return Plan((*launches, *walks), outputs, workspace | between)
    on_hopper = residuals and sm90_training.available(call, facts)
    # Without a gate P is the same for all value heads of a key head: there it is kept once.
    heads = call.H if on_hopper else call.HV
    workspace["core"] = ((*tokens, chunk), call.dtype)
    workspace["p"] = ((call.B, call.T, heads, chunk), call.dtype)
    workspace |= running_sums(call)
    states = None
    if residuals:
        states = C_TYPES[call.dtype.name]
        workspace["states"] = (chunked_states(call, chunk), call.dtype)
        workspace["corrections"] = ((*tokens, call.V), call.dtype)
    if on_hopper:
        launches.append(sm90_training.factors_launch(call))
        division = sm90_training.forward_division(call, facts)
        if division.segments > 1:
            workspace |= sm90.segment_arrays(call, division.segments - 1)
        launches += sm90_training.forward_launches(call, division)
        return Plan(tuple(launches), outputs, workspace)
    launches.append(wy_factors_launch(call, chunk, facts, factors=False))
    segments = segment_count(call, chunk, facts)
    initial = "initial_state"
    if segments > 1:
        initial = "entering"
        workspace |= segment_arrays(call, segments)
        cut = dict(segments=segments, transfer=True, output=None, initial=None)
        launches += [
            walk_launch(call, chunk, facts, final="segment_h", **cut),
            walk_launch(call, chunk, facts, final="segment_p", zero_v=True, **cut),
            segment_states_launch(call, segments),
        ]
    launches.append(
        walk_launch(call, chunk, facts, segments=segments, states=states, initial=initial)
    )
    return Plan(tuple(launches), outputs, workspace)


def segment_arrays(call: Call, segments: int) -> dict:
    N, heads = call.N, call.state_shape[1:]
    square = (call.HV, call.K, call.K)
    shapes = {
        "segment_h": (N, segments - 1, *heads),
        "segment_p": (N, segments - 1, *square),
        "entering": (N, segments, *heads),
    }
    return {name: (shape, call.state_dtype) for name, shape in shapes.items()}


@planned
def plan_backward(call: Call, facts: DeviceFacts, has_dfinal: bool) -> Plan:
    """Plan `chunk_delta_rule_bwd`, from what `plan_forward` with residuals has left."""
    chunk = training_chunk(call, facts)
    tokens = (call.B, call.T, call.HV)
    dtype = call.dtype
    outputs = {
        "dq": (keys(call), dtype),
        "dk": (keys(call), dtype),
        "dv": (values(call), dtype),
        "dbeta": (tokens, np.dtype(np.float32)),
        "dinitial_state": (call.state_shape, call.state_dtype),
    }
    workspace = {
        "dstates": (chunked_states(call, chunk), dtype),
        "g_rows": ((*tokens, call.V), dtype),
    }
    if sm90_training.available(call, facts):
        division = sm90_training.backward_division(call, facts)
        if division.segments > 1:
            workspace |= sm90.segment_arrays(call, division.segments - 1)
        launches = [
            *sm90_training.backward_launches(call, division, has_dfinal),
            sm90_backward.backward_chunk_launch(call, facts),
        ]
    else:
        launches = [
            backward_state_launch(call, chunk, facts, has_dfinal),
            backward_chunk_launch(call, chunk, facts),
        ]
    if call.qk_l2norm:
        launches += [norm_launch(call, x, f"d{x}", backward=True) for x in ("q", "k")]
    return Plan(tuple(launches), outputs, workspace)


@planned
def names_for_backward(call: Call, facts: DeviceFacts) -> tuple[str, ...]:
    """Name the arrays of the forward that the backward reads; refuse what it would refuse."""
    backward = plan_backward(call, facts, True)
    forward = plan_forward(call, facts, True)
    there = {name for name, *_ in forward.read + forward.made}
    return tuple(name for name, _ in backward.read if name in there)


def chunked_states(call: Call, chunk: int) -> tuple[int, ...]:
    return (call.B, call.chunk_slots(chunk), call.HV, call.K, call.V)


def normalised(call: Call, *names: str) -> tuple[list[Launch], dict]:
    """Return the launches that normalise q and k if they are to be, and the arrays for that."""
    if not call.qk_l2norm:
        return [], {}
    launches = [norm_launch(call, name, normal(call, name)) for name in names]
    return launches, {normal(call, name): (keys(call), call.dtype) for name in names}


def running_sums(call: Call) -> dict:
    """Return the array of the running sums of g in each chunk; none without a gate."""
    if call.gate is None:
        return {}
    return {"G": ((call.B, call.T, call.HV), np.dtype(np.float64))}


# ---- the building blocks -------------------------------------------------------------------------


@planned
def plan_wy_factors(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `wy_factors`."""
    chunk = chunk_of(call)
    launches, workspace = normalised(call, "k")
    launches.append(wy_factors_launch(call, chunk, facts, factors=True))
    return Plan(tuple(launches), factor_arrays(call, chunk), workspace | running_sums(call))


def factor_arrays(call: Call, chunk: int) -> dict:
    tokens = (call.B, call.T, call.HV)
    sizes = {"w": call.K, "u": call.V, "t": chunk}
    return {name: ((*tokens, size), call.dtype) for name, size in sizes.items()}


def prepared(call: Call, chunk: int, *names: str) -> tuple[list[Launch], dict]:
    """Return launches and arrays for what a piece reads beside factors: norms and sums of g."""
    launches, workspace = normalised(call, *names)
    if call.gate is not None:
        launches.append(gate_sums_launch(call, chunk))
    return launches, workspace | running_sums(call)


@planned
def plan_state_pass(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `state_pass`; chunk slots that no chunk uses are zero."""
    chunk = chunk_of(call)
    outputs = {
        "states": (chunked_states(call, chunk), call.state_dtype),
        "v_new": (values(call), call.dtype),
        "final_state": (call.state_shape, call.state_dtype),
    }
    launches, workspace = prepared(call, chunk, "k")
    launches.append(walk_launch(call, chunk, facts, factors=True, states="float", output=None))
    zeroed = ("states",) if call.varlen else ()
    return Plan(tuple(launches), outputs, workspace, zeroed=zeroed)


@planned
def plan_chunk_output(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `chunk_output`."""
    chunk = chunk_of(call)
    check_chunk_axis(call, chunk)
    launches, workspace = prepared(call, chunk, "q", "k")
    launches.append(chunk_output_launch(call, chunk, facts))
    return Plan(tuple(launches), {"o": (values(call), call.dtype)}, workspace)


@planned
def plan_transfer(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `sequence_transfer`: H from the zero state, P from the identity without values."""
    outputs = {
        "p": ((call.N, call.HV, call.K, call.K), call.state_dtype),
        "h": ((call.N, call.HV, call.K, call.V), call.state_dtype),
    }
    chunk = chunk_of(call)
    factors = plan_wy_factors(call, facts)
    options = dict(factors=True, output=None, initial=None)
    walks = (
        walk_launch(call, chunk, facts, final="h", **options),
        walk_launch(call, chunk, facts, final="p", zero_v=True, **options),
    )
    return Plan((*factors.launches, *walks), outputs, factors.outputs | factors.workspace)


@planned
def plan_tokens(call: Call, step: bool) -> Plan:
    """Plan `recurrent_delta_rule` or `delta_rule_step`."""
    check_sizes(call)
    check_gate(call)
    outputs = {"o": (values(call), call.dtype)}
    if not step:
        outputs["final_state"] = (call.state_shape, call.state_dtype)
    launch = step_launch(call) if step else token_launch(call)
    return Plan((launch,), outputs, sums=call.compute_dtype)


@lru_cache(256)
def plan_affine(shape: tuple, columns: int, dtype, add: bool) -> Plan:
    """Plan P X + H for stacks (N, HV, K, .)."""
    if dtype.name not in ("float32", "float64"):
        raise NotImplementedError(
            f"h: transfers of {dtype.name} are not supported on CuPy arrays; those that"
            " sequence_transfer returns are float32"
        )
    launch = affine_launch(shape, columns, dtype, add)
    return Plan((launch,), {"y": ((*shape, columns), dtype)})
