"""From a Problem and facts of a device to a plan: launches in order, and the arrays they need.

What the kernels do not do is refused here, naming the option and what would work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps

import numpy as np

from ..problem import Problem, check_chunk_axis
from .portable.backward import backward_chunk_launch, backward_state_launch
from .portable.decode import step_launch
from .portable.factors import wy_factors_launch
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
    """Keep what is planned with the problem, for all calls that are alike: it holds no array."""

    @wraps(function)
    def lookup(problem: Problem, *more):
        key = (lookup, *more)
        plan = problem.kept.get(key)
        if plan is None:
            plan = problem.kept[key] = function(problem, *more)
        return plan

    return lookup


# ---- what can be asked for -----------------------------------------------------------------------


def check_sizes(problem: Problem) -> None:
    if problem.T >= 2**31:
        raise NotImplementedError(
            f"T = {problem.T}: CuPy arrays support fewer than 2**31 tokens along T"
        )
    for name, size in (("K", problem.K), ("V", problem.V)):
        if size > MAX_HEAD:
            raise NotImplementedError(
                f"{name} = {size}: CuPy arrays support head sizes up to {MAX_HEAD};"
                " NumPy arrays any"
            )


def check_gate(problem: Problem) -> None:
    if problem.gate == "channel":
        raise NotImplementedError(
            "g: a gate per key channel, (B, T, HV, K), is not supported on CuPy arrays;"
            " a scalar gate (B, T, HV) is, and NumPy arrays support both"
        )


def check_gate_gradients(problem: Problem) -> None:
    if problem.g is not None:
        raise NotImplementedError(
            "g: gradients through a gate are not supported on CuPy arrays; NumPy arrays support"
            " them, and chunk_delta_rule runs the gate forward"
        )


def chunk_of(problem: Problem) -> int:
    """Return the chunk size in force, or refuse what the chunked kernels do not do."""
    check_sizes(problem)
    check_gate(problem)
    if problem.dtype.name == "float64":
        raise NotImplementedError(
            "float64: the chunked operators on CuPy arrays take float32, float16 and bfloat16;"
            " recurrent_delta_rule and delta_rule_step take float64"
        )
    if problem.chunk_size is None:
        return DEFAULT_CHUNK[problem.dtype.name]
    if problem.chunk_size not in CHUNKS:
        raise NotImplementedError(
            f"chunk_size = {problem.chunk_size}: CuPy arrays support 16, 32 and 64, or None"
        )
    return problem.chunk_size


def training_chunk(problem: Problem, facts: DeviceFacts) -> int:
    """Return the chunk size of the gradients' kernels and of the forward that leaves residuals."""
    chunk = chunk_of(problem)
    return sm90.CHUNK if sm90_training.available(problem, facts) else chunk


# ---- the operators -------------------------------------------------------------------------------


@planned
def plan_forward(problem: Problem, facts: DeviceFacts, residuals: bool = False) -> Plan:
    """Plan `chunk_delta_rule`, and with `residuals` what its gradients read."""
    chunk = training_chunk(problem, facts) if residuals else chunk_of(problem)
    tokens = (problem.B, problem.T, problem.HV)
    outputs = {
        "o": ((*tokens, problem.V), problem.dtype),
        "final_state": (problem.state_shape, problem.state_dtype),
    }
    workspace, launches = {}, []
    if problem.qk_l2norm:
        for name, x in (("q", problem.q), ("k", problem.k)):
            workspace[normal(problem, name)] = (tuple(x.shape), problem.dtype)
            launches.append(norm_launch(problem, name, normal(problem, name)))
    if sm90.available(problem, facts) and not residuals:
        walks, between = sm90.forward_launches(problem, sm90.division(problem, facts))
        return Plan((*launches, *walks), outputs, workspace | between)
    on_hopper = residuals and sm90_training.available(problem, facts)
    # Without a gate P is the same for all value heads of a key head: there it is kept once.
    heads = problem.H if on_hopper else problem.HV
    workspace["core"] = ((*tokens, chunk), problem.dtype)
    workspace["p"] = ((problem.B, problem.T, heads, chunk), problem.dtype)
    if problem.g is not None:
        workspace["G"] = (tokens, np.dtype(np.float64))
    states = None
    if residuals:
        states = C_TYPES[problem.dtype.name]
        workspace["states"] = (chunked_states(problem, chunk), problem.dtype)
        workspace["corrections"] = ((*tokens, problem.V), problem.dtype)
    if on_hopper:
        launches.append(sm90_training.factors_launch(problem))
        division = sm90_training.forward_division(problem, facts)
        if division.segments > 1:
            workspace |= sm90.segment_arrays(problem, division.segments - 1)
        launches += sm90_training.forward_launches(problem, division)
        return Plan(tuple(launches), outputs, workspace)
    launches.append(wy_factors_launch(problem, chunk, facts, factors=False))
    segments = segment_count(problem, chunk, facts)
    initial = "initial_state"
    if segments > 1:
        initial = "entering"
        workspace |= segment_arrays(problem, segments)
        cut = dict(segments=segments, transfer=True, output=None, initial=None)
        launches += [
            walk_launch(problem, chunk, facts, final="segment_h", **cut),
            walk_launch(problem, chunk, facts, final="segment_p", zero_v=True, **cut),
            segment_states_launch(problem, segments),
        ]
    launches.append(
        walk_launch(problem, chunk, facts, segments=segments, states=states, initial=initial)
    )
    return Plan(tuple(launches), outputs, workspace)


def segment_arrays(problem: Problem, segments: int) -> dict:
    N, heads = problem.N, problem.state_shape[1:]
    square = (problem.HV, problem.K, problem.K)
    shapes = {
        "segment_h": (N, segments - 1, *heads),
        "segment_p": (N, segments - 1, *square),
        "entering": (N, segments, *heads),
    }
    return {name: (shape, problem.state_dtype) for name, shape in shapes.items()}


@planned
def plan_backward(problem: Problem, facts: DeviceFacts, has_dfinal: bool) -> Plan:
    """Plan `chunk_delta_rule_bwd`, from what `plan_forward` with residuals has left."""
    chunk = training_chunk(problem, facts)
    tokens = (problem.B, problem.T, problem.HV)
    dtype = problem.dtype
    outputs = {
        "dq": (tuple(problem.q.shape), dtype),
        "dk": (tuple(problem.k.shape), dtype),
        "dv": (tuple(problem.v.shape), dtype),
        "dbeta": (tokens, np.dtype(np.float32)),
        "dinitial_state": (problem.state_shape, problem.state_dtype),
    }
    workspace = {
        "dstates": (chunked_states(problem, chunk), dtype),
        "g_rows": ((*tokens, problem.V), dtype),
    }
    if sm90_training.available(problem, facts):
        division = sm90_training.backward_division(problem, facts)
        if division.segments > 1:
            workspace |= sm90.segment_arrays(problem, division.segments - 1)
        launches = [
            *sm90_training.backward_launches(problem, division, has_dfinal),
            sm90_backward.backward_chunk_launch(problem, facts),
        ]
    else:
        launches = [
            backward_state_launch(problem, chunk, facts, has_dfinal),
            backward_chunk_launch(problem, chunk, facts),
        ]
    if problem.qk_l2norm:
        launches += [norm_launch(problem, x, f"d{x}", backward=True) for x in ("q", "k")]
    return Plan(tuple(launches), outputs, workspace)


@planned
def names_for_backward(problem: Problem, facts: DeviceFacts) -> tuple[str, ...]:
    """Name the arrays of the forward that the backward reads; refuse what it would refuse."""
    backward = plan_backward(problem, facts, True)
    forward = plan_forward(problem, facts, True)
    there = {name for name, *_ in forward.read + forward.made}
    return tuple(name for name, _ in backward.read if name in there)


def chunked_states(problem: Problem, chunk: int) -> tuple[int, ...]:
    return (problem.B, problem.chunk_slots(chunk), problem.HV, problem.K, problem.V)


@planned
def plan_wy_factors(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `wy_factors`."""
    chunk = chunk_of(problem)
    return Plan(
        (wy_factors_launch(problem, chunk, facts, factors=True),), factor_arrays(problem, chunk)
    )


def factor_arrays(problem: Problem, chunk: int) -> dict:
    tokens = (problem.B, problem.T, problem.HV)
    sizes = {"w": problem.K, "u": problem.V, "t": chunk}
    return {name: ((*tokens, size), problem.dtype) for name, size in sizes.items()}


@planned
def plan_state_pass(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `state_pass`; chunk slots that no chunk uses are zero."""
    chunk = chunk_of(problem)
    outputs = {
        "states": (chunked_states(problem, chunk), problem.state_dtype),
        "v_new": ((problem.B, problem.T, problem.HV, problem.V), problem.dtype),
        "final_state": (problem.state_shape, problem.state_dtype),
    }
    walk = walk_launch(problem, chunk, facts, factors=True, states="float", output=None)
    zeroed = ("states",) if problem.cu_seqlens is not None else ()
    return Plan((walk,), outputs, zeroed=zeroed)


@planned
def plan_chunk_output(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `chunk_output`."""
    chunk = chunk_of(problem)
    check_chunk_axis(problem, chunk)
    outputs = {"o": (tuple(problem.v_new.shape), problem.dtype)}
    return Plan((chunk_output_launch(problem, chunk, facts),), outputs)


@planned
def plan_transfer(problem: Problem, facts: DeviceFacts) -> Plan:
    """Plan `sequence_transfer`: H from the zero state, P from the identity without values."""
    chunk = chunk_of(problem)
    outputs = {
        "p": ((problem.N, problem.HV, problem.K, problem.K), problem.state_dtype),
        "h": ((problem.N, problem.HV, problem.K, problem.V), problem.state_dtype),
    }
    options = dict(factors=True, output=None)
    launches = (
        wy_factors_launch(problem, chunk, facts, factors=True),
        walk_launch(problem, chunk, facts, initial=None, final="h", **options),
        walk_launch(problem, chunk, facts, initial=None, final="p", zero_v=True, **options),
    )
    return Plan(launches, outputs, factor_arrays(problem, chunk))


@planned
def plan_tokens(problem: Problem, step: bool) -> Plan:
    """Plan `recurrent_delta_rule` or `delta_rule_step`."""
    check_sizes(problem)
    check_gate(problem)
    outputs = {"o": (tuple(problem.v.shape), problem.dtype)}
    if not step:
        outputs["final_state"] = (problem.state_shape, problem.state_dtype)
    launch = step_launch(problem) if step else token_launch(problem)
    return Plan((launch,), outputs, sums=problem.compute_dtype)


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
