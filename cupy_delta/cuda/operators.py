"""The backend's functions, one per public operator: prepare, plan, execute."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from ..problem import Problem
from ..raw import BetaGradients, GateGradients
from ..workspace import left_aside
from . import plan as plans
from .runtime.execute import execute
from .spec import Device, Plan, Tells
from .tokens.affine import maps_of_rows, plan_affine


def device_of(x) -> Device:
    """Return the device that a CuPy array lives on."""
    return device_by_index(x.data.device_id)


@cache
def device_by_index(index: int) -> Device:
    """Return the device with this number of CUDA's."""
    from .runtime.device import CupyDevice

    return CupyDevice(index)


def chunk_delta_rule(problem: Problem):
    """Return (o, final_state, checkpoints), the last None if none are asked for."""
    with device_of(problem.v) as device:
        plan = plans.plan("forward", problem, device.facts)
        targets = {"o": problem.out, "state": problem.state}
        results = execute(plan, vars(problem), device, targets)
    if problem.state is not None:
        results["final_state"] = problem.state
    return *_results(problem, results), results.get("checkpoints")


def chunk_delta_rule_fwd(problem: Problem):
    """Return (o, final_state, saved); saved holds what the gradients' kernels read."""
    with device_of(problem.v) as device:
        plan, names = plans.plan_with_residuals(problem, device.facts)
        results = execute(plan, vars(problem), device, {"o": problem.out})
    o, final_state = _results(problem, results)
    return o, final_state, {name: results[name] for name in names}


def _results(problem: Problem, results: dict):
    return results["o"] if problem.out is None else problem.out, results["final_state"]


def chunk_delta_rule_bwd(residuals, do, dfinal_state):
    """Return the gradients of (q, k, v, beta, g, initial_state)."""
    problem = residuals.problem
    with device_of(problem.v) as device:
        plan = plans.plan("backward", problem, device.facts)
        gradients = {"do": do, "dfinal_state": dfinal_state}
        results = execute(plan, gradients, device, ready=residuals.saved)
        return _gradients(problem, results, device)


def _gradients(problem: Problem, results: dict, device: Device):
    for name in ("beta", "g", "logits", "a", "A_log", "dt_bias", "initial_state"):
        x, d = getattr(problem, name), f"d{name}"
        if x is not None and results[d].dtype != x.dtype:
            results[d] = device.bring(results[d], d, x.dtype)
    dbeta = results["dbeta"] if problem.raw_beta is None else BetaGradients(results["dlogits"])
    dg = None if problem.gate is None else results["dg"]
    if problem.raw_gate is not None:
        dg = GateGradients(results["da"], results["dA_log"], results.get("ddt_bias"))
    dinitial = None if problem.initial_state is None else results["dinitial_state"]
    return results["dq"], results["dk"], results["dv"], dbeta, dg, dinitial


class Begun(NamedTuple):
    """The first half of an operation: P and H that are told, and what the second half reads."""

    told: tuple[Any, Any]
    second: Plan
    arrays: dict
    problem: Problem
    saved: tuple[str, ...] = ()


def begin_forward(problem: Problem, tells: Tells, residuals: bool) -> Begun | None:
    """Do what needs no state that enters; None where no kernels do that for a call."""
    operation = "training" if residuals else "forward"
    with device_of(problem.v) as device:
        halves = plans.halves(operation, problem, device.facts, tells)
        if halves is None:
            return None
        names = plans.residuals_of_halves(problem, device.facts, tells) if residuals else ()
        arrays = execute(halves.first, vars(problem), device)
    told = arrays.get("told_p"), arrays.get("told_h")
    return Begun(told, halves.second, arrays, problem, names)


def finish_forward(begun: Begun, initial_state):
    """Return (o, final_state, saved) from the state that enters."""
    problem = begun.problem
    given = vars(problem) | {"initial_state": initial_state}
    with device_of(problem.v) as device:
        results = execute(begun.second, given, device, {"o": problem.out}, begun.arrays)
    o, final_state = _results(problem, results)
    return o, final_state, {name: results[name] for name in begun.saved}


def begin_backward(residuals, do, dfinal_state, tells: Tells) -> Begun:
    """Do what needs no gradient of a state that enters from elsewhere."""
    problem = residuals.problem
    with device_of(problem.v) as device:
        halves = plans.halves("backward", problem, device.facts, tells)
        assert halves is not None  # as there were some for the forward
        gradients = {"do": do, "dfinal_state": dfinal_state}
        arrays = execute(halves.first, gradients, device, ready=residuals.saved)
    return Begun((arrays.get("told_p"), arrays.get("told_h")), halves.second, arrays, problem)


def finish_backward(begun: Begun, do, dfinal_state):
    """Return the gradients as `chunk_delta_rule_bwd` does, from that of the state that leaves."""
    with device_of(begun.problem.v) as device:
        given = {"do": do, "dfinal_state": dfinal_state}
        results = execute(begun.second, given, device, ready=begun.arrays)
        return _gradients(begun.problem, results, device)


def recurrent_delta_rule(problem: Problem):
    """Return (o, final_state)."""
    with device_of(problem.v) as device:
        plan = plans.plan("recurrent", problem, device.facts)
        results = execute(plan, vars(problem), device, {"o": problem.out})
    return _results(problem, results)


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated.

    Calls with `out` on the same memory are the same launch, which is kept.
    """
    with device_of(problem.v) as device:
        plan = plans.plan("step", problem, device.facts)
        targets = {"o": problem.out, "state": problem.state}
        results = execute(plan, vars(problem), device, targets)
        if problem.passed is not None and problem.out is not None:
            _keep_launch(problem, plan, results, device)
    return results["o"] if problem.out is None else problem.out


def _keep_launch(problem: Problem, plan: Plan, results: dict, device) -> None:
    """Keep a launch whose arrays are all the caller's own, as kernels read and write them."""
    given = vars(problem) | {"o": problem.out}
    names = set().union(*(launch.arrays() for launch in plan.working))
    if len(plan.working) == 1 and all(results[name] is given.get(name) for name in names):
        problem.passed.again = device.repeated(plan.working[0], results)


def wy_factors(problem: Problem):
    """Return (w, u, t)."""
    with device_of(problem.v) as device:
        plan = plans.plan("wy_factors", problem, device.facts)
        results = execute(plan, vars(problem), device)
    return results["w"], results["u"], results["t"]


def state_pass(problem: Problem):
    """Return (states, v_new, final_state)."""
    with device_of(problem.k) as device:
        plan = plans.plan("state_pass", problem, device.facts)
        results = execute(plan, vars(problem), device)
    return results["states"], results["v_new"], results["final_state"]


def chunk_output(problem: Problem):
    """Return o."""
    with device_of(problem.q) as device:
        plan = plans.plan("chunk_output", problem, device.facts)
        return execute(plan, vars(problem), device)["o"]


def sequence_transfer(problem: Problem):
    """Return (p, h)."""
    with device_of(problem.v) as device:
        plan = plans.plan("transfer", problem, device.facts)
        results = execute(plan, vars(problem), device)
    return results["p"], results["h"]


def affine(p, x, h):
    """Return P x + h, or P x where h is None, for stacks (N, HV, K, .)."""
    with device_of(p) as device, left_aside():
        plan = plan_affine(p.shape[:3], x.shape[3], x.dtype, h is not None)
        return execute(plan, {"p": p, "x": x, "h": h}, device)["y"]


def joined(told, ranks: range, shape: tuple[int, int, int, int]):
    """Return the state that the transfers in these rows of `told` leave, in the order of `ranks`.

    A row holds P and H, (N, HV, K, V), of a rank; of the first only H counts.
    """
    if len(ranks) == 1:
        return told[ranks[0], -math.prod(shape) :].reshape(shape)
    with device_of(told) as device, left_aside():
        plan = plan_affine(shape[:3], shape[3], told.dtype, True, maps_of_rows(ranks, shape))
        return execute(plan, dict.fromkeys("pxh", told), device)["y"]
