"""Seconds to the first result on a GPU, by phase: python benchmarks/first_call.py

Cold: nothing compiled before. Warm: with the cache that a cold process has left. Every figure is
the median of new processes, each cold one with a new cache; one that is not counted goes first, so
that the files of Python, CuPy and CUDA lie in memory. Kernels are compiled together, as a call does
it, and with --alone in more cold processes one after the other, which shows what each takes alone.
Needs CuPy and a GPU, and of cupy_delta no more than this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
# What kernels of one file differ in, where the name alone does not tell them apart.
TELLING = ("TRANSFER", "JOINS", "KEPT", "MATH", "CLUSTER", "PLACED", "SEGMENTS", "STARTS", "HEAD_V")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4, help="of q and k")
    parser.add_argument("--value-heads", type=int, help="of v (default: as many)")
    parser.add_argument("--size", type=int, default=128, help="K and V")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--gate", action="store_true", help="one per value head")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--alone", action="store_true", help="also in processes that compile one after the other"
    )
    parser.add_argument("-o", "--output", help="JSON file")
    parser.add_argument("--child", choices=("together", "alone"), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


class Phases:
    """Seconds by phase, each from the end of the one before."""

    def __init__(self, started: float):
        self.seconds: dict[str, float] = {}
        self._last = started

    def ends(self, name: str) -> None:
        now = time.time()
        self.seconds[name] = now - self._last
        self._last = now


def child(args: argparse.Namespace) -> None:
    """Compute a first result, and print the phases as JSON."""
    phases = Phases(args.started)
    phases.ends("Python")
    import numpy as np

    phases.ends("import numpy")
    import cupy

    phases.ends("import cupy")
    import cupy_delta
    from cupy_delta.arrays import FLOAT_DTYPES
    from cupy_delta.cuda import operators
    from cupy_delta.cuda import plan as plans
    from cupy_delta.problem import operator_problem

    phases.ends("import cupy_delta")
    cupy.cuda.runtime.memGetInfo()
    phases.ends("CUDA context")
    B, T, H, HV, D = 1, args.tokens, args.heads, args.value_heads or args.heads, args.size
    dtype = FLOAT_DTYPES[args.dtype]
    zeros = [np.zeros((B, T, heads, D), dtype) for heads in (H, H, HV)]
    of_tokens = [np.full((B, T, HV), x, np.float32) for x in (0.0, -0.1)[: 1 + args.gate]]
    arrays = [cupy.asarray(x) for x in (*zeros, *of_tokens)]
    cupy.cuda.runtime.deviceSynchronize()
    phases.ends("arrays")
    cupy.cuda.nvrtc.getVersion()
    phases.ends("NVRTC's library")
    options = dict(scale=None, qk_l2norm=False, state_layout="kv", out=None)
    given = arrays if args.gate else (*arrays, None)
    problem = operator_problem(*given, initial_state=None, cu_seqlens=None, **options)
    device = operators.device_of(arrays[2])
    with device:
        launches = plans.plan("forward", problem, device.facts).working
        phases.ends("device and plan")
        if args.child == "together":
            device.prepare(launches)
            phases.ends("kernels, together")
        else:
            for i, launch in enumerate(launches):
                device.prepare((launch,))
                macros = (f"{k}={v}" for k, v in launch.defines if k in TELLING)
                phases.ends(f"{i + 1}. {launch.entry} {' '.join(macros)}")
    cupy_delta.chunk_delta_rule(*arrays)
    cupy.cuda.runtime.deviceSynchronize()
    phases.ends("first call")
    cupy_delta.chunk_delta_rule(*arrays)
    cupy.cuda.runtime.deviceSynchronize()
    phases.ends("second call")
    print(json.dumps(phases.seconds))


def measure(mode: str, cache: str) -> dict[str, float]:
    """Return the phases of a new process with these caches."""
    env = os.environ | {"CUPY_CACHE_DIR": cache, "CUDA_CACHE_PATH": cache}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, *sys.argv[1:], "--child", mode]
    done = subprocess.run(
        [*command, "--started", repr(time.time())], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr.strip() or f"{' '.join(command)}: status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    runs: dict[str, list] = {"cold": [], "warm": [], "alone": []}
    with tempfile.TemporaryDirectory() as cache:
        measure("together", cache)
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            runs["cold"].append(measure("together", cache))
            runs["warm"].append(measure("together", cache))
        if args.alone:
            with tempfile.TemporaryDirectory() as cache:
                runs["alone"].append(measure("alone", cache))
    heads = f"{args.heads}/{args.value_heads or args.heads}"
    print(
        f"{args.dtype}, {args.tokens} tokens, heads {heads}, K = V = {args.size},"
        f" {'a gate' if args.gate else 'no gate'}:"
        f" seconds, medians of {args.repeats} processes, {os.cpu_count()} cores"
    )
    cold, warm, alone = (medians(runs[name]) if runs[name] else {} for name in runs)
    print(f"{'':20}{'cold':>8}{'warm':>8}")
    second = cold.pop("second call"), warm.pop("second call")
    whole = "first result"
    cold[whole], warm[whole] = (
        median(sum(run.values()) - run["second call"] for run in runs[name])
        for name in ("cold", "warm")
    )
    for name in cold:
        print(f"{name:20}{cold[name]:8.3f}{warm[name]:8.3f}")
    print(f"{'second call':20}{second[0]:8.3f}{second[1]:8.3f}")
    if args.alone:
        print("one after the other, cold:")
    for name, seconds in alone.items():
        if name[0].isdigit():
            print(f"{seconds:8.3f}  {name}")
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
