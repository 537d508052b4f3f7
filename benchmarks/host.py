"""Microseconds that a call costs the host, by stage: python benchmarks/host.py

On CuPy arrays where they can be used, of calls that nobody waits for; elsewhere on NumPy arrays and
a device that keeps its buffers and launches nothing, which shows what the library itself takes.
"""

from __future__ import annotations

import time
from functools import cache, partial

import ml_dtypes
import numpy as np

import cupy_delta
from cupy_delta import cuda, dispatch
from cupy_delta.cuda import operators
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.problem import operator_problem, step_problem

# Batch, tokens, heads of q and k, and of v; K = V = 128, bfloat16.
SHAPES = [(1, 128, 2, 4), (8, 1024, 4, 16), (1, 2048, 2, 8)]
STEP = (64, 1, 4, 16)
CALLS, REPEATS = 100, 30


kept = cache(np.empty)


class Idle:
    """A device whose arrays are NumPy's: it puts arguments together and launches nothing."""

    facts = DeviceFacts(sm_count=132, shared_bytes=227 * 1024, capability=(9, 0))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def empty(self, shape, dtype, name):
        return kept(shape, dtype)

    def bring(self, x, name, dtype):
        return np.ascontiguousarray(x, dtype)

    def target(self, x, name):
        return x

    def prepare(self, launches):
        pass

    def launch(self, launch, arrays):
        values = list(launch.arguments)
        for i, name in launch.pointers:
            values[i] = arrays[name]
        for i, box in launch.boxes:
            values[i] = box, arrays[box.name]


def microseconds(call, wait) -> float:
    """Median over repeats of the time per call; the device catches up between them."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
        wait()
    return float(np.median(times))


def draw(xp, B, T, H, HV, D=128):
    """Zeros do: no time of the host depends on values."""
    bf16 = np.dtype(ml_dtypes.bfloat16)
    q, k, v = (xp.zeros((B, T, heads, D), bf16) for heads in (H, H, HV))
    return q, k, v, xp.zeros((B, T, HV), np.float32), xp.zeros((B, HV, D, D), np.float32)


def stages(call, check, planned, targets, wait) -> list[float]:
    """Of a whole call, its checks, finding its plan, its launches, and the arrays for them."""
    problem = check()
    with operators.device_of(problem.v) as device:
        plan = planned(problem, device)
        arrays = execute(plan, vars(problem), device, targets)

        def launches():
            for launch in plan.working:
                device.launch(launch, arrays)

        steps = (
            check,
            partial(planned, problem, device),
            launches,
            partial(execute, plan, vars(problem), device, targets),
        )
        *times, executed = (microseconds(step, wait) for step in steps)
    return [microseconds(call, wait), *times, executed - times[-1]]


def main() -> None:
    if cuda.environment()["problem"] is None:
        import cupy as xp

        wait = xp.cuda.Device().synchronize
    else:
        xp, wait, idle = np, lambda: None, Idle()
        dispatch.BACKENDS["numpy"] = "cupy_delta.cuda"
        operators.device_of = lambda x: idle
    print(f"arrays of {xp.__name__}, {CALLS} calls at a time, medians of {REPEATS}, microseconds")
    print(
        f"{'':22}" + "".join(f"{x:>10}" for x in ("call", "checks", "plan", "launches", "arrays"))
    )
    options = dict(scale=None, qk_l2norm=False, state_layout="kv", out=None)
    for shape in SHAPES:
        *args, _ = draw(xp, *shape)
        call = partial(cupy_delta.chunk_delta_rule, *args)
        check = partial(
            operator_problem, *args, None, initial_state=None, cu_seqlens=None, **options
        )
        times = stages(call, check, lambda p, d: plans.plan("forward", p, d.facts), {}, wait)
        row("forward {}x{} h{}/{}".format(*shape), times)
    *args, state = draw(xp, *STEP)
    call = partial(cupy_delta.delta_rule_step, *args, state=state)
    check = partial(step_problem, *args, None, state=state, state_indices=None, **options)
    times = stages(call, check, lambda p, d: plans.plan("step", p, d.facts), {"state": state}, wait)
    row("step of {0} h{2}/{3}".format(*STEP), times)
    repeated_steps(xp, wait)
    *args, _ = draw(xp, *SHAPES[1])
    forward = partial(cupy_delta.chunk_delta_rule_fwd, *args)
    residuals = forward().residuals
    backward = partial(cupy_delta.chunk_delta_rule_bwd, residuals, args[2])
    row("forward for gradients", [microseconds(forward, wait)])
    row("backward", [microseconds(backward, wait)])


def repeated_steps(xp, wait) -> None:
    """Of whole calls as engines make them, on the same memory every time."""
    q, k, v, beta, state = draw(xp, *STEP)
    logits, A_log = xp.zeros(beta.shape, v.dtype), xp.zeros(beta.shape[-1:], np.float32)
    raw = cupy_delta.SigmoidBeta(logits), cupy_delta.SoftplusGate(logits, A_log)
    # Indices on the host are looked at.
    slots = None if xp is np else xp.arange(len(state))
    pool = dict(state=state, state_indices=slots, qk_l2norm=True)
    for name, given in (("arrays", (beta, -beta)), ("logits", raw)):
        call = partial(cupy_delta.delta_rule_step, q, k, v, *given, **pool)
        row(f"again, of {name}", [microseconds(call, wait)])
        call = partial(call, out=xp.zeros_like(v))
        row("  with out", [microseconds(call, wait)])
        with cupy_delta.Workspace():
            row("  in a Workspace", [microseconds(call, wait)])


def row(name: str, times: list[float]) -> None:
    print(f"{name:22}" + "".join(f"{x:10.1f}" for x in times), flush=True)


if __name__ == "__main__":
    main()
