"""Time whole sequences on slots of a pool, and with checkpoints, beside the same without either.

python benchmarks/prefill.py [-o FILE]
Medians of CUDA graph replays in turns, microseconds, of ragged sequences in bfloat16. The call on a
pool is first compared, to the bit, with the one that has an array of initial states.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cupy
import ml_dtypes
import numpy as np

import cupy_delta

# Sequences, tokens of each, key heads, value heads.
ROWS = ((1, 512, 16, 32), (1, 8192, 16, 32), (8, 512, 16, 32), (8, 2048, 16, 32), (64, 128, 16, 32))
K = V = 128
EVERY = 256
REPLAYS = 15


def arrays(N: int, T: int, H: int, HV: int, gate: bool):
    """Ragged sequences of T tokens on average, end to end, and a pool in bfloat16 and float32."""
    rng = cupy.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    q, k, v = normal(1, N * T, H, K), normal(1, N * T, H, K), normal(1, N * T, HV, V)
    beta = rng.random((1, N * T, HV), np.float32)
    g = -0.05 * rng.random((1, N * T, HV), np.float32) if gate else None
    lengths = np.full(N, T)
    lengths[: N // 2] -= T // 3
    lengths[N - N // 2 :] += T // 3
    ends = cupy.asarray(np.concatenate([[0], np.cumsum(lengths)]))
    pool = rng.standard_normal((2 * N, HV, K, V), np.float32)
    return (
        (q, k, v, beta, g),
        ends,
        cupy.asarray(np.random.default_rng(0).permutation(2 * N)[:N]),
        pool,
    )


def calls(N: int, T: int, H: int, HV: int, gate: bool) -> dict:
    """Return calls by name; each is right when this returns."""
    args, ends, slots, pool = arrays(N, T, H, HV, gate)
    common = dict(cu_seqlens=ends, qk_l2norm=True)
    initial, out = pool[slots], cupy.empty_like(args[2])
    narrow = pool.astype(ml_dtypes.bfloat16)

    def plain():
        return cupy_delta.chunk_delta_rule(*args, **common, initial_state=initial, out=out)

    def on(states, **more):
        where = dict(state=states, state_indices=slots)
        return cupy_delta.chunk_delta_rule(*args, **common, **where, **more, out=out)

    expected = plain()
    o, final = expected.o.copy(), expected.final_state.copy()
    before = pool.copy()
    on(pool)
    assert bool((pool[slots] == final).all()) and bool((out == o).all())
    pool[...] = before
    return {
        "initial_state": plain,
        "pool": lambda: on(pool),
        "pool bfloat16": lambda: on(narrow),
        f"pool, checkpoints every {EVERY}": lambda: on(pool, checkpoint_every=EVERY),
    }


def timed(some: dict) -> dict:
    """Median microseconds of graph replays, in turns."""
    stream, graphs, workspaces = cupy.cuda.Stream(non_blocking=True), {}, []
    cupy.cuda.Device().synchronize()
    for name, call in some.items():
        workspaces.append(cupy_delta.Workspace())
        with stream, workspaces[-1]:
            call()
            stream.synchronize()
            stream.begin_capture()
            for _ in range(5):
                call()
            graphs[name] = stream.end_capture()
    times: dict = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times[name].append(1000 * cupy.cuda.get_elapsed_time(start, end) / 5)
    return {name: round(float(np.median(x)), 1) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    results = []
    for gate in (False, True):
        for N, T, H, HV in ROWS:
            found = timed(calls(N, T, H, HV, gate))
            results.append(dict(sequences=N, tokens=T, H=H, HV=HV, gate=gate, microseconds=found))
            print(f"{N} x {T} h{H}/{HV} {'gate' if gate else '    '}", found, flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
