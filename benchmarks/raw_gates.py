"""Raw gates on a GPU: calls with logits and parameters beside calls with g and beta as arrays.

``arrays`` are g and beta in float32, which somebody has formed before; ``formed`` includes forming
them from logits of 16 bits, by a copy in float32 and one fused CuPy kernel each; ``raw`` is
`SoftplusGate` and `SigmoidBeta`. Times are of CUDA graph replays, medians over turns. Outputs, and
the gradients that all have, are compared with those of ``arrays``. The last table is of the kernels
that form a gate per key channel and carry its gradient back, beside the time that a copy takes for
as many bytes. Only ``raw`` carries gradients back to logits and parameters.

    python benchmarks/raw_gates.py
"""

from __future__ import annotations

import argparse
import statistics
import sys

import cupy
import ml_dtypes
import numpy as np

import cupy_delta
from cupy_delta.call import Call
from cupy_delta.commands.console import print_table
from cupy_delta.cuda.operators import device_by_index
from cupy_delta.cuda.spec import SUMS
from cupy_delta.cuda.tokens import raw as kernels
from cupy_delta.raw import RawGate

BF16, D = np.dtype(ml_dtypes.bfloat16), 128
# (B, T, H, HV)
SHAPES = ((1, 1024, 16, 32), (1, 8192, 2, 8), (1, 8192, 16, 64), (4, 8192, 16, 64))
CHANNELS = ((1, 8192, 32), (1, 32768, 32))

softplus_gate = cupy.ElementwiseKernel(
    "float32 a, float32 A_log, float32 dt_bias",
    "float32 g",
    "float x = a + dt_bias; g = -expf(A_log) * (fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))))",
    "softplus_gate",
)
sigmoid_beta = cupy.ElementwiseKernel(
    "float32 x", "float32 beta", "beta = 1.0f / (1.0f + expf(-x))", "sigmoid_beta"
)


class Clock:
    """A stream, and the time that graphs take on it."""

    def __init__(self):
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def graph(self, call):
        """Capture a call, whose first run, outside, compiles and allocates."""
        with self.stream:
            call()
            self.stream.synchronize()
            self.stream.begin_capture()
            call()
            return self.stream.end_capture()

    def milliseconds(self, graph, times: int = 20) -> float:
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(self.stream)
        for _ in range(times):
            graph.launch(self.stream)
        stop.record(self.stream)
        stop.synchronize()
        return cupy.cuda.get_elapsed_time(start, stop) / times


def in_turns(clock: Clock, graphs: dict, turns: int) -> dict:
    found = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            found[name].append(clock.milliseconds(graph))
    return {name: statistics.median(x[1:]) for name, x in found.items()}


def apart(x, y) -> float:
    x, y = (a.astype(np.float32) for a in (x, y))
    return float(cupy.abs(x - y).max() / cupy.maximum(1, cupy.abs(y).max()))


def operators(clock: Clock, shape, turns: int) -> list:
    """Forward, and forward with backward, of every way."""
    B, T, H, HV = shape
    rng = cupy.random.default_rng(0)

    def normal(*sizes):
        return rng.standard_normal(sizes, "float32")

    q, k = normal(B, T, H, D).astype(BF16), normal(B, T, H, D).astype(BF16)
    v, do = normal(B, T, HV, D).astype(BF16), normal(B, T, HV, D).astype(BF16)
    a, b = normal(B, T, HV).astype(BF16), normal(B, T, HV).astype(BF16)
    A_log, dt_bias = -cupy.abs(normal(HV)), normal(HV) - 3
    given = {
        "arrays": (
            sigmoid_beta(b.astype("float32")),
            softplus_gate(a.astype("float32"), A_log, dt_bias),
        ),
        "raw": (cupy_delta.SigmoidBeta(b), cupy_delta.SoftplusGate(a, A_log, dt_bias)),
    }
    formed, wide = (tuple(map(cupy.empty_like, given["arrays"])) for _ in range(2))
    cupy.cuda.Device().synchronize()
    forwards, both, outputs, gradients, kept = {}, {}, {}, {}, []
    for name in ("arrays", "formed", "raw"):
        beta_and_g, workspace = given.get(name, formed), cupy_delta.Workspace()
        o = cupy.empty_like(v)
        kept.append((workspace, o))

        def form(name=name):
            if name == "formed":
                cupy.copyto(wide[0], b)
                sigmoid_beta(wide[0], formed[0])
                cupy.copyto(wide[1], a)
                softplus_gate(wide[1], A_log, dt_bias, formed[1])

        def forward(args=beta_and_g, o=o, form=form):
            form()
            return cupy_delta.chunk_delta_rule(q, k, v, *args, qk_l2norm=True, out=o).o

        def training(args=beta_and_g, o=o, form=form):
            form()
            residuals = cupy_delta.chunk_delta_rule_fwd(
                q, k, v, *args, qk_l2norm=True, out=o
            ).residuals
            return cupy_delta.chunk_delta_rule_bwd(residuals, do)

        with clock.stream, workspace:
            outputs[name] = forward().copy()
            forwards[name] = clock.graph(forward)
            gradients[name] = [x.copy() for x in training()[:3]]
            both[name] = clock.graph(training)
    cupy.cuda.Device().synchronize()
    error = max(apart(outputs[x], outputs["arrays"]) for x in ("formed", "raw"))
    error = max(error, *map(apart, gradients["raw"], gradients["arrays"]))
    forward, training = (in_turns(clock, x, turns) for x in (forwards, both))
    label = f"{B}x{T} h{H}/{HV}"
    return [label, *(f"{x[n]:.4f}" for x in (forward, training) for n in forwards), f"{error:.1e}"]


def channel_kernels(clock: Clock, shape, turns: int) -> list:
    """A gate per key channel formed and carried back, and what their bytes take."""
    B, T, HV = shape
    raw = RawGate("softplus", BF16, "channel", 0.0)
    sizes = dict(B=B, T=T, N=B, H=HV, HV=HV, K=D, V=D)
    call = Call(dtype=BF16, gate="channel", raw_gate=raw, **sizes)
    rng = cupy.random.default_rng(0)
    made = {"sums": (kernels.gate_parts(call), HV, D, 2), "dA_log": (HV,), "ddt_bias": (HV, D)}
    arrays = {name: cupy.empty(size, SUMS) for name, size in made.items()}
    arrays["a"] = rng.standard_normal((B, T, HV, D), "float32").astype(BF16)
    arrays["da"] = cupy.empty_like(arrays["a"])
    arrays["g"] = arrays["dg"] = cupy.empty((B, T, HV, D), SUMS)
    arrays |= dict(A_log=cupy.zeros(HV, SUMS), dt_bias=cupy.zeros((HV, D), SUMS))
    forms = (kernels.raw_gate_launch(call, SUMS),)
    back = (kernels.raw_gate_gradient_launch(call), kernels.raw_gate_sums_launch(call))
    device, copied = device_by_index(0), cupy.empty_like(arrays["g"])
    cupy.cuda.Device().synchronize()

    def launched(launches):
        with device:
            device.prepare(launches)
            for launch in launches:
                device.launch(launch, arrays)

    graphs = {
        "form": clock.graph(lambda: launched(forms)),
        "back": clock.graph(lambda: launched(back)),
        "copy": clock.graph(lambda: cupy.copyto(copied, arrays["g"])),
    }
    found = in_turns(clock, graphs, turns)
    count = B * T * HV * D
    rate = 8 * count / found["copy"]
    floors = (6 * count / rate, 8 * count / rate)
    names = ("form", "back")
    return [
        f"{B}x{T} h{HV}",
        *(f"{x:.4f}" for n, f in zip(names, floors, strict=True) for x in (found[n], f)),
        f"{rate / 1e9:.2f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=11, help="(default: %(default)s)")
    args = parser.parse_args()
    clock = Clock()
    ways = [f"{part} {way}" for part in ("forward", "both") for way in ("arrays", "formed", "raw")]
    rows = [operators(clock, shape, args.turns) for shape in SHAPES]
    print_table(["tokens, heads (ms)", *ways, "apart"], rows)
    rows = [channel_kernels(clock, shape, args.turns) for shape in CHANNELS]
    print_table(["a gate per key channel (ms)", "form", "bytes", "back", "bytes", "TB/s"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
