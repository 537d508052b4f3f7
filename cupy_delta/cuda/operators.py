"""The backend's functions, one per public operator: prepare, plan, execute."""

from __future__ import annotations

from ..problem import Problem
from . import plan as plans
from .launch import device_arrays, execute
from .workspace import left_aside

OPERATOR_ARRAYS = ("q", "k", "v", "beta", "g", "initial_state", "cu_seqlens")


def device_of(x):
    """Return the device that a CuPy array lives on."""
    from .device import CupyDevice

    return CupyDevice(x.device.id)


def chunk_delta_rule(problem: Problem):
    """Return (o, final_state)."""
    return _forward(problem, residuals=False)[:2]


def chunk_delta_rule_fwd(problem: Problem):
    """Return (o, final_state, saved); saved holds what the gradients' kernels read."""
    with device_of(problem.v) as device:
        backward = plans.plan_backward(problem, device.facts, True)
    o, final_state, results = _forward(problem, residuals=True)
    read = set().union(*(launch.array_names for launch in backward.launches))
    return o, final_state, {name: x for name, x in results.items() if name in read}


def _forward(problem: Problem, residuals: bool):
    with device_of(problem.v) as device:
        plan = plans.plan_forward(problem, device.facts, residuals)
        arrays = device_arrays(problem, device, OPERATOR_ARRAYS)
        results = execute(plan, arrays, device, {"o": problem.out})
    o = results["o"] if problem.out is None else problem.out
    return o, results["final_state"], results


def chunk_delta_rule_bwd(residuals, do, dfinal_state):
    """Return the gradients of (q, k, v, beta, g, initial_state)."""
    problem = residuals.problem
    plans.check_gate_gradients(problem)
    with device_of(problem.v) as device:
        plan = plans.plan_backward(problem, device.facts, dfinal_state is not None)
        arrays = residuals.saved | {
            "do": device.bring(do, "do", None),
            "dfinal_state": None
            if dfinal_state is None
            else device.bring(dfinal_state, "dfinal_state", None),
        }
        results = execute(plan, arrays, device)
        dbeta = results["dbeta"]
        if dbeta.dtype != problem.beta.dtype:
            dbeta = device.bring(dbeta, "dbeta", problem.beta.dtype)
    dinitial = None if problem.initial_state is None else results["dinitial_state"]
    return results["dq"], results["dk"], results["dv"], dbeta, None, dinitial


def recurrent_delta_rule(problem: Problem):
    """Return (o, final_state)."""
    with device_of(problem.v) as device:
        plan = plans.plan_tokens(problem, False)
        arrays = device_arrays(problem, device, OPERATOR_ARRAYS)
        results = execute(plan, arrays, device, {"o": problem.out})
    return results["o"] if problem.out is None else problem.out, results["final_state"]


def delta_rule_step(problem: Problem):
    """Return o; `problem.state` is updated."""
    with device_of(problem.v) as device:
        plan = plans.plan_tokens(problem, True)
        arrays = device_arrays(problem, device, ("q", "k", "v", "beta", "g", "state_indices"))
        arrays["state"] = device.target(problem.state, "state")
        results = execute(plan, arrays, device, {"o": problem.out})
    return results["o"] if problem.out is None else problem.out


def wy_factors(problem: Problem):
    """Return (w, u, t)."""
    with device_of(problem.v) as device:
        plan = plans.plan_wy_factors(problem, device.facts)
        arrays = device_arrays(problem, device, ("k", "v", "beta", "cu_seqlens"))
        results = execute(plan, arrays, device)
    return results["w"], results["u"], results["t"]


def state_pass(problem: Problem):
    """Return (states, v_new, final_state)."""
    with device_of(problem.k) as device:
        plan = plans.plan_state_pass(problem, device.facts)
        arrays = device_arrays(problem, device, ("k", "w", "u", "initial_state", "cu_seqlens"))
        results = execute(plan, arrays, device)
    return results["states"], results["v_new"], results["final_state"]


def chunk_output(problem: Problem):
    """Return o."""
    with device_of(problem.q) as device:
        plan = plans.plan_chunk_output(problem, device.facts)
        arrays = device_arrays(problem, device, ("q", "k", "v_new", "states", "cu_seqlens"))
        return execute(plan, arrays, device)["o"]


def sequence_transfer(problem: Problem):
    """Return (p, h)."""
    with device_of(problem.v) as device:
        plan = plans.plan_transfer(problem, device.facts)
        arrays = device_arrays(problem, device, ("k", "v", "beta", "cu_seqlens"))
        results = execute(plan, arrays, device)
    return results["p"], results["h"]


def affine(p, x, h):
    """Return P x + h, or P x where h is None, for stacks (N, HV, K, .)."""
    with device_of(p) as device, left_aside():
        plan = plans.plan_affine(p.shape[:3], x.shape[3], x.dtype, h is not None)
        arrays = {
            name: None if a is None else device.bring(a, name, None)
            for name, a in (("p", p), ("x", x), ("h", h))
        }
        return execute(plan, arrays, device)["y"]
