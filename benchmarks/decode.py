"""Decoding on a GPU: `delta_rule_step` over a pool of states, beside a copy and beside FlashInfer.

A step reads every state once and writes it once, as a copy of the states does; a verification, with
0 tokens accepted, only reads. Times are of CUDA graph replays, medians over turns, of enough calls
on other pools each, as of a model's layers, that no state is still in the L2 cache. Every
contestant's outputs are compared with the float64 token loop. K = V = 128, 16 key heads and 32
value heads, inputs of bfloat16.

    python benchmarks/decode.py -o benchmarks/results/DATE-GPU-decode.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from typing import NamedTuple

import cupy
import ml_dtypes
import numpy as np
from comparison import decoding
from comparison.contestants import torch_stream

import cupy_delta
from cupy_delta.commands.console import print_table
from cupy_delta.commands.output import write_json

H, HV, D = decoding.H, decoding.HV, decoding.D
BATCHES, TOKENS = (1, 2, 4, 8, 16, 64, 256), (1, 4)
L2_BYTES = 50e6
# Copies of half a gigabyte and more take CUDA's own copy longer than a kernel.
COPY = cupy.ElementwiseKernel("float32 x", "float32 y", "y = x", "copy_states")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Row(NamedTuple):
    """A batch of sequences with so many new tokens each, and what their pool is like."""

    B: int
    T: int
    pool: str
    layout: str
    gate: str
    what: str  # "step", or "verify" with 0 tokens accepted

    @property
    def state_bytes(self) -> int:
        return self.B * HV * D * D * DTYPES[self.pool].itemsize

    @property
    def calls(self) -> int:
        """Calls of a graph, each on a pool of its own."""
        return min(128, max(4, math.ceil(2 * L2_BYTES / self.state_bytes)))


def rows(args) -> list[Row]:
    found = []
    for pool in args.pools:
        for layout in args.layouts:
            for B in args.batches:
                for T in args.tokens:
                    found.append(Row(B, T, pool, layout, "scalar", "step"))
                    if T > 1:
                        found.append(Row(B, T, pool, layout, "scalar", "verify"))
            for gate in args.gates:
                found += [Row(64, T, pool, layout, gate, "step") for T in args.tokens]
    return found


def graph_of(calls, stream):
    """Capture a run of calls; the first run, outside, compiles and allocates."""
    for call in calls:
        call()
    stream.synchronize()
    stream.begin_capture()
    try:
        for call in calls:
            call()
    except Exception:
        with suppress(Exception):  # what is left of it
            stream.end_capture()
        raise
    return stream.end_capture()


def milliseconds(graph, stream) -> float:
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    graph.launch(stream)
    stop.record(stream)
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop)


def measure(row: Row, repeats: int, peers: bool) -> dict:
    """Time everybody on a row, in turns."""
    inputs = decoding.draw(row, DTYPES[row.pool])
    stream = cupy.cuda.Stream(non_blocking=True)
    graphs, errors, failed = {}, {}, {}
    kept = []  # a graph holds none of the memory that it reads and writes
    cupy.cuda.Device().synchronize()
    with stream, torch_stream(stream) if peers else nullcontext():
        parts = [x.view(np.float32) for x in inputs.pools]
        aside = cupy.empty_like(parts[0])
        for name, copy in (("memcpy", cupy.copyto), ("kernel", lambda to, x: COPY(x, to))):
            graphs[name] = graph_of([lambda x=x, copy=copy: copy(aside, x) for x in parts], stream)
        for contestant in [decoding.Ours, decoding.OursFormed] + [decoding.FlashInfer] * peers:
            try:
                one = contestant(row, inputs)
                kept.append(one)
                errors[one.name] = decoding.error(row, inputs, one)
                graphs[one.name] = one.graph(graph_of, stream)
            except Exception as error:
                failed[contestant.name] = f"{type(error).__name__}: {error}"[:200]
        times = {name: [] for name in graphs}
        for _ in range(repeats):
            for name, graph in graphs.items():
                times[name].append(milliseconds(graph, stream) / row.calls)
    us = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    us["copy"] = min(us.pop("memcpy"), us.pop("kernel"))
    return row._asdict() | dict(us=us, errors=errors, failed=failed, state_bytes=row.state_bytes)


def line(found: dict) -> list[str]:
    us, errors = found["us"], found["errors"]
    copy = us["copy"] * (0.5 if found["what"] == "verify" else 1)
    cells = [str(found[name]) for name in ("B", "T", "pool", "layout", "gate", "what")]
    ours, formed, theirs = (us.get(x) for x in ("cupy_delta", "cupy_delta, arrays", "flashinfer"))
    cells += [f"{us['copy']:.1f}", "" if ours is None else f"{ours:.1f}"]
    cells += ["" if ours is None else f"{copy / ours:.2f}"]
    cells += ["" if x is None else f"{x:.1f}" for x in (formed, theirs)]
    return cells + [f"{e:.1e}" for e in errors.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--pools", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=("kv", "vk"), default=["kv", "vk"])
    parser.add_argument("--gates", nargs="*", default=["none", "channel"])
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for starting rows")
    parser.add_argument("--alone", action="store_true", help="no peers")
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args()
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    peers = not args.alone and decoding.FlashInfer.there()
    print(f"{gpu}, h{H}/{HV}, K = V = {D}; FlashInfer {'there' if peers else 'not there'}")
    start, report = time.perf_counter(), []
    for row in rows(args):
        if time.perf_counter() - start > args.budget:
            print("out of time")
            break
        report.append(measure(row, args.repeats, peers))
        cupy.get_default_memory_pool().free_all_blocks()
    header = [
        "B",
        "T",
        "pool",
        "layout",
        "gate",
        "what",
        "copy us",
        "us",
        "copy / us",
        "arrays",
        "FlashInfer",
    ]
    print_table([*header, "errors"], [line(found)[: len(header) + 1] for found in report])
    for found in report:
        for name, why in found["failed"].items():
            print(*(found[x] for x in Row._fields), name, why)
    if args.output:
        version = cupy_delta.__version__
        write_json(args.output, {"gpu": gpu, "cupy_delta": version, "rows": report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
