"""Decoding steps on the CPU beside the same equations in plain NumPy, and small chunked calls.

``plain`` is the definition in three einsum calls per token, on the same states in place, without a
check of anything. Contestants take turns; a time is the median over them of a mean over calls.

    python benchmarks/steps.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

import cupy_delta
from cupy_delta.commands.console import print_table
from cupy_delta.commands.output import write_json

# Sequences, tokens, heads, K = V.
SHAPES = ((2, 1, 2, 16), (1, 4, 1, 8), (8, 1, 16, 64), (8, 1, 16, 128), (64, 1, 16, 128))


def inputs(B: int, T: int, H: int, D: int):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, B, T, H, D), np.float32) / np.float32(D) ** 0.5
    return q, k, v, rng.uniform(0, 1, (B, T, H)).astype(np.float32)


def plain(q, k, v, beta, state):
    o, scale = np.empty_like(v), q.shape[-1] ** -0.5
    for t in range(q.shape[1]):
        r = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state += np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * r)
        o[:, t] = scale * np.einsum("bhkv,bhk->bhv", state, q[:, t])
    return o


def contestants(shape) -> dict:
    arrays = inputs(*shape)
    B, _, H, D = shape
    states = np.zeros((2, B, H, D, D), np.float32)
    return {
        "plain": lambda: plain(*arrays, states[0]),
        "step": lambda: cupy_delta.delta_rule_step(*arrays, state=states[1]),
        "chunk": lambda: cupy_delta.chunk_delta_rule(*arrays),
    }


def seconds(call, budget: float) -> float:
    """Mean over as many calls as fit into the budget, of 1 to 1000."""
    start = time.perf_counter()
    call()
    count = min(1000, max(1, int(budget / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=21, help="(default: %(default)s)")
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        field = contestants(shape)
        turns = {name: [] for name in field}
        for _ in range(args.turns):
            for name, call in field.items():
                turns[name].append(seconds(call, 0.02))
        times = {name: statistics.median(t) * 1e6 for name, t in turns.items()}
        ratios = [s / p for s, p in zip(turns["step"], turns["plain"], strict=True)]
        rows.append(
            [*shape, *(f"{x:.1f}" for x in times.values()), f"{statistics.median(ratios):.2f}"]
        )
    header = ["B", "T", "H", "K = V", "plain us", "step us", "chunk us", "step / plain"]
    print_table(header, rows)
    if args.output:
        write_json(args.output, [dict(zip(header, row, strict=True)) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
