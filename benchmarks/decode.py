"""Decoding on a GPU: one `delta_rule_step` over a pool of states beside a copy of the same pool.

A step reads every state once and writes it once, as a copy does: the table gives the bytes per
second of both, and their ratio. Times are of CUDA graph replays, medians; K = V = 128.

    python benchmarks/decode.py -o benchmarks/results/DATE-GPU-decode.json
"""

from __future__ import annotations

import argparse
import statistics
import sys

import cupy
import ml_dtypes
import numpy as np

import cupy_delta
from cupy_delta.commands.console import print_table
from cupy_delta.commands.output import write_json

D = 128
CALLS = 10
HEADS = 32


def graph_of(call, stream):
    """Capture a run of calls; the first one, outside, compiles and allocates."""
    call()
    stream.synchronize()
    stream.begin_capture()
    for _ in range(CALLS):
        call()
    return stream.end_capture()


def milliseconds(graph, stream) -> float:
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    graph.launch(stream)
    stop.record(stream)
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / CALLS


def measure(states: int, dtype, layout: str, repeats: int) -> dict:
    rng = cupy.random.default_rng(0)
    B = states // HEADS
    draw = [rng.standard_normal((B, 1, HEADS, D), cupy.float32) for _ in range(3)]
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in draw)
    beta = rng.random((B, 1, HEADS), cupy.float32)
    pool = cupy.zeros((B, HEADS, D, D), dtype)
    copy, out = cupy.empty_like(pool), cupy.empty_like(v)
    stream, workspace = cupy.cuda.Stream(non_blocking=True), cupy_delta.Workspace()
    options = dict(state=pool, qk_l2norm=True, state_layout=layout, out=out)
    cupy.cuda.Device().synchronize()
    with stream, workspace:
        graphs = {
            "copy": graph_of(lambda: cupy.copyto(copy, pool), stream),
            "step": graph_of(lambda: cupy_delta.delta_rule_step(q, k, v, beta, **options), stream),
        }
        times = {name: [] for name in graphs}
        for _ in range(repeats):
            for name, graph in graphs.items():
                times[name].append(milliseconds(graph, stream))
    ms = {name: statistics.median(t) for name, t in times.items()}
    bytes_ = {"copy": 2 * pool.nbytes, "step": 2 * pool.nbytes + 4 * q.nbytes + beta.nbytes}
    return {
        "states": states,
        "dtype": np.dtype(dtype).name,
        "layout": layout,
        "ms": ms,
        "bytes_per_s": {name: bytes_[name] / ms[name] * 1e3 for name in ms},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args()
    rows = [
        measure(states, dtype, layout, args.repeats)
        for states in (2048, 8192)
        for dtype in (np.float32, ml_dtypes.bfloat16)
        for layout in ("kv", "vk")
    ]
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{gpu}, one token per state, K = V = {D}")
    table = []
    for row in rows:
        step, copy = row["bytes_per_s"]["step"], row["bytes_per_s"]["copy"]
        cells = [row["states"], row["dtype"], row["layout"], f"{row['ms']['step'] * 1e3:.1f}"]
        table.append([*cells, f"{step / 1e12:.2f}", f"{copy / 1e12:.2f}", f"{step / copy:.2f}"])
    print_table(["states", "dtype", "layout", "step us", "step TB/s", "copy TB/s", "ratio"], table)
    if args.output:
        report = {"gpu": gpu, "cupy_delta": cupy_delta.__version__, "rows": rows}
        write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
