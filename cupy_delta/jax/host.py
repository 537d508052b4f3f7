"""The CPU platform: a custom call runs the NumPy backend on XLA's buffers, in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from .. import operators
from .. import problem as checks
from ..call import Call
from ..reference.tiles import DEFAULT_CHUNK, most_blocks
from ..results import DeltaRuleGradients, Residuals
from .work import BACKWARD, FORWARD, RECURRENT, STEP, WHOLE, Buffer, Work

NAME = "cpu"
CHECKPOINTS = "checkpoints"


def contract() -> tuple[str, ...]:
    return ()


def check(function: str, call: Call) -> None:
    """NumPy arrays support everything."""


def residuals(call: Call) -> tuple[Buffer, ...]:
    """The state that enters each block."""
    blocks = most_blocks(call, call.chunk_size or DEFAULT_CHUNK)
    return (Buffer(CHECKPOINTS, (blocks, call.HV, call.K, call.V), call.state_dtype),)


def trace(bind, function: str, call: Call, arrays: dict, results: tuple[Buffer, ...]) -> dict:
    # In a process that has another platform the residuals are that platform's. Here they are zeros
    # then, and the backward does without.
    foreign = set()
    if function == FORWARD:
        foreign = {x.name for x in results[2:]} - {CHECKPOINTS}
    elif function == BACKWARD:
        known = {*DeltaRuleGradients._fields, "cu_seqlens", "do", "dfinal_state", CHECKPOINTS}
        arrays = {name: x for name, x in arrays.items() if name in known}
    made = bind(arrays, tuple(x for x in results if x.name not in foreign))
    return made | {x.name: jnp.zeros(x.shape, x.dtype) for x in results if x.name in foreign}


def prepare(work: Work) -> None:
    """There is nothing to compile."""


def run(work: Work, sources: list[int], targets: list[int], context) -> None:
    given = {x.name: _view(x, at) for x, at in zip(work.sources, sources, strict=True)}
    made = {x.name: _view(x, at) for x, at in zip(work.targets, targets, strict=True)}
    for x in given.values():
        x.flags.writeable = False
    call = work.call
    options = dict(scale=call.scale, qk_l2norm=call.qk_l2norm, state_layout=call.state_layout) | (
        {} if call.chunk_size is None else dict(chunk_size=call.chunk_size)
    )
    _FUNCTIONS[work.function](given, options, made)


def _view(x: Buffer, address: int) -> np.ndarray:
    if not x.nbytes:
        return np.empty(x.shape, x.dtype)
    memory = (ctypes.c_ubyte * x.nbytes).from_address(address)
    return np.frombuffer(memoryview(memory), x.dtype).reshape(x.shape)


def _whole(operator) -> Callable[[dict, dict, dict], None]:
    def function(given: dict, options: dict, made: dict) -> None:
        result = operator(**given, **options, out=made["o"])
        made["final_state"][...] = result.final_state

    return function


def _forward_with_residuals(given: dict, options: dict, made: dict) -> None:
    result = operators.chunk_delta_rule_fwd(**given, **options, out=made["o"])
    made["final_state"][...] = result.final_state
    if CHECKPOINTS in made:
        states = result.residuals.saved[CHECKPOINTS]
        made[CHECKPOINTS][: len(states)] = states
        made[CHECKPOINTS][len(states) :] = 0


def _backward(given: dict, options: dict, made: dict) -> None:
    gradients_of = {name: given.pop(name) for name in ("do", "dfinal_state")}
    states = given.pop(CHECKPOINTS, None)
    if states is None:
        residuals = operators.chunk_delta_rule_fwd(**given, **options).residuals
    else:
        absent = dict.fromkeys(("g", "initial_state", "cu_seqlens", "out"))
        problem = checks.operator_problem(**absent | given | options)
        residuals = Residuals(problem, {CHECKPOINTS: states})
    gradients = operators.chunk_delta_rule_bwd(residuals, **gradients_of)
    for name, gradient in zip(DeltaRuleGradients._fields, gradients, strict=True):
        if gradient is not None:
            made[f"d{name}"][...] = gradient


def _step(given: dict, options: dict, made: dict) -> None:
    before, state = given.pop("state"), made["state"]
    if before.ctypes.data != state.ctypes.data:
        state[...] = before
    operators.delta_rule_step(**given, **options, state=state, out=made["o"])


_FUNCTIONS = {
    WHOLE: _whole(operators.chunk_delta_rule),
    RECURRENT: _whole(operators.recurrent_delta_rule),
    FORWARD: _forward_with_residuals,
    BACKWARD: _backward,
    STEP: _step,
}
