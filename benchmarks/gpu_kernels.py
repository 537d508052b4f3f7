"""GPU benchmark: the CUDA kernels in bfloat16 at K = V = 128 beside fla's Triton kernels.

Each row times both on the same arrays in one process, one after the other in every repeat, with
CUDA events around a run of calls; medians. fla (flash-linear-attention) is timed if PyTorch, Triton
and fla can be imported. Errors are against the float64 operator on the CPU, on a short problem.

    python benchmarks/gpu_kernels.py -o benchmarks/results/DATE-gpu-kernels.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

import cupy
import ml_dtypes
import numpy as np

import cupy_delta
from cupy_delta.commands.console import print_table, write_json

D = 128
ROWS = (
    (1, 32768, 8),
    (1, 32768, 16),
    (1, 32768, 32),
    (4, 8192, 32),
    (8, 1024, 16),
    (1, 8192, 8),
    (1, 2048, 8),
)


def draw(B: int, T: int, H: int, seed: int = 0) -> list:
    """q, k, v, beta and a gradient in bfloat16, keys of unit length, on the GPU."""
    rng = cupy.random.default_rng(seed)
    q, k, v, do = (rng.standard_normal((B, T, H, D), cupy.float32) for _ in range(4))
    k /= cupy.sqrt((k * k).sum(-1, keepdims=True))
    q /= cupy.sqrt((q * q).sum(-1, keepdims=True))
    beta = rng.random((B, T, H), cupy.float32)
    return [x.astype(ml_dtypes.bfloat16) for x in (q, k, v, beta, do)]


class Ours:
    name = "cupy_delta"

    def __init__(self, arrays):
        *self.arrays, self.do = arrays
        self.residuals = None

    def forward(self):
        return cupy_delta.chunk_delta_rule(*self.arrays).o

    def prepare_backward(self):
        self.residuals = cupy_delta.chunk_delta_rule_fwd(*self.arrays).residuals

    def backward(self):
        return cupy_delta.chunk_delta_rule_bwd(self.residuals, self.do)[:4]

    @staticmethod
    def to_host(x):
        return x.get().astype(np.float64)


class Fla:
    name = "fla"

    def __init__(self, arrays):
        import torch
        from fla.ops.delta_rule import chunk_delta_rule

        self.rule = chunk_delta_rule
        *tensors, self.do = (torch.from_dlpack(x) for x in arrays)
        self.tensors = [x.detach().clone().requires_grad_() for x in tensors]
        self.plain = [x.detach() for x in self.tensors]
        self.o = None

    def forward(self):
        return self.rule(*self.plain)[0]

    def prepare_backward(self):
        self.o = self.rule(*self.tensors)[0]

    def backward(self):
        import torch

        return torch.autograd.grad(self.o, self.tensors, self.do, retain_graph=True)

    @staticmethod
    def to_host(x):
        return x.double().cpu().numpy()


def milliseconds(call, calls: int) -> float:
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / calls


def errors(contestant) -> dict:
    """Relative errors in the Frobenius norm against float64 on the CPU."""
    arrays = draw(1, 1000, 2, seed=1)
    wide = [x.get().astype(np.float64) for x in arrays]
    exact = cupy_delta.chunk_delta_rule_fwd(*wide[:4])
    gradients = cupy_delta.chunk_delta_rule_bwd(exact.residuals, wide[4])
    short = contestant(arrays)
    o = short.to_host(short.forward())
    short.prepare_backward()
    found = {"o": (o, exact.o)}
    for name, x in zip(("q", "k", "v", "beta"), short.backward(), strict=True):
        found[name] = (short.to_host(x), getattr(gradients, name))
    return {n: float(np.linalg.norm(x - y) / np.linalg.norm(y)) for n, (x, y) in found.items()}


FIRST_CALL = """
import time; start = time.perf_counter()
import cupy, cupy_delta, numpy
q = cupy.asarray(numpy.full((1, 1024, 4, 128), 1 / 12, numpy.float16))
beta = cupy.asarray(numpy.ones((1, 1024, 4), numpy.float32))
o, state = cupy_delta.chunk_delta_rule(q, q, q, beta)
cupy.cuda.get_current_stream().synchronize()
print(time.perf_counter() - start)
"""


def first_call() -> dict:
    """Seconds from the import to the first result, in a new process: empty cache, then warm."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"CUPY_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_CALL]
        return {
            state: float(
                subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            )
            for state in ("cold", "warm")
        }


def host_microseconds() -> float:
    """Time the host needs to issue one small call, with beta in float as the kernels read it."""
    *arrays, _ = draw(1, 64, 1)
    arrays[3] = arrays[3].astype(np.float32)
    out = cupy.empty_like(arrays[2])
    for _ in range(20):
        cupy_delta.chunk_delta_rule(*arrays, out=out)
    cupy.cuda.get_current_stream().synchronize()
    start = time.perf_counter()
    for _ in range(200):
        cupy_delta.chunk_delta_rule(*arrays, out=out)
    elapsed = time.perf_counter() - start
    cupy.cuda.get_current_stream().synchronize()
    return elapsed / 200 * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args()
    contestants = [Ours]
    try:
        Fla(draw(1, 64, 1))
        contestants.append(Fla)
    except ImportError as error:
        print(f"without fla: {error}", file=sys.stderr)
    report = {
        "gpu": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "versions": {
            n: package(n)
            for n in ("cupy_delta", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton", "fla-core")
        },
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "first_call_s": first_call(),
        "host_us": host_microseconds(),
        "error": {c.name: errors(c) for c in contestants},
        "rows": [],
    }
    for B, T, H in ROWS:
        field = [c(draw(B, T, H)) for c in contestants]
        for passes in ("forward", "backward"):
            times = {c.name: [] for c in field}
            for c in field:
                if passes == "backward":
                    c.prepare_backward()
                milliseconds(getattr(c, passes), 3)
            for _ in range(args.repeats):
                for c in field:
                    times[c.name].append(milliseconds(getattr(c, passes), 5))
            row = {"row": f"{B}x{T} h{H}", "pass": passes}
            row["ms"] = {n: statistics.median(t) for n, t in times.items()}
            row["spread"] = {n: (max(t) - min(t)) / statistics.median(t) for n, t in times.items()}
            report["rows"].append(row)
        del field
        cupy.get_default_memory_pool().free_all_blocks()
    show(report)
    if args.output:
        write_json(args.output, report)
    return 0


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return cupy_delta.__version__ if name == "cupy_delta" else None


def show(report: dict) -> None:
    print(f"{report['gpu']}, bfloat16, K = V = {D}; versions {report['versions']}")
    cold, warm = report["first_call_s"]["cold"], report["first_call_s"]["warm"]
    print(f"first result after {cold:.2f} s (empty cache), {warm:.2f} s (warm), import included")
    print(f"host time per call {report['host_us']:.0f} us")
    for name, found in report["error"].items():
        print(f"error of {name}: " + ", ".join(f"{n} {e:.1e}" for n, e in found.items()))
    names = list(report["rows"][0]["ms"])
    header = ["row", "pass", *(f"{n} ms" for n in names)]
    header += ["fla / ours"] if "fla" in names else []
    table = []
    for row in report["rows"]:
        cells = [row["row"], row["pass"], *(f"{row['ms'][n]:.3f}" for n in names)]
        if "fla" in names:
            cells.append(f"{row['ms']['fla'] / row['ms']['cupy_delta']:.2f}")
        table.append(cells)
    print_table(header, table)


if __name__ == "__main__":
    sys.exit(main())
