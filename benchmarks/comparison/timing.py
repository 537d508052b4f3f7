"""Time contestants in turn, on inputs that the cache has forgotten, and check what they compute."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from .contestants import torch_stream
from .rows import Inputs, Row, copies_past_cache, draw, floor_ms

LEAST_MS = 1.5  # a timed run takes at least this long, so that the events' own time does not count
MOST_LAUNCHES = 20


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def say(text: str) -> None:
    """Tell what is going on: compiling can take minutes."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """One way of running one contestant: `once` makes `calls` calls."""

    name: str
    kind: str  # "graph": replays of a captured graph; "eager": calls
    once: Callable[[], object]
    calls: int
    times: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name} {self.kind}"


def take_turns(runs: list[Run], clock, repeats: int) -> dict[str, str]:
    """Fill every run's times, one after the other within each repeat; return what failed.

    `clock` returns the milliseconds that a callable takes. A first run, not counted, decides how
    often a run is repeated between two readings of the clock.
    """
    failed: dict[str, str] = {}

    def attempt(run: Run, launches: int) -> float | None:
        def several():
            for _ in range(launches):
                run.once()

        try:
            return clock(several) if run.key not in failed else None
        except Exception as error:
            failed[run.key] = one_line(error)
            return None

    launches = {}
    for run in runs:
        attempt(run, 1)
        elapsed = max(attempt(run, 1) or LEAST_MS, LEAST_MS / MOST_LAUNCHES)
        launches[run.key] = math.ceil(LEAST_MS / elapsed)
    for _ in range(repeats):
        for run in runs:
            elapsed = attempt(run, launches[run.key])
            if elapsed is not None:
                run.times.append(elapsed / launches[run.key] / run.calls)
    return failed


def summarise(runs: list[Run]) -> dict:
    """Medians, and the spread over the repeats relative to them."""
    result: dict = {"ms": {}, "eager_ms": {}, "spread": {}, "eager_spread": {}}
    for run in runs:
        if run.times:
            median, prefix = statistics.median(run.times), "" if run.kind == "graph" else "eager_"
            result[prefix + "ms"][run.name] = median
            result[prefix + "spread"][run.name] = (max(run.times) - min(run.times)) / median
    return result


class Gpu:
    """One GPU, one stream, and the clock of its events."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = properties["name"].decode()
        self.cache_bytes = int(properties["l2CacheSize"])

    @contextmanager
    def current(self):
        """Everything inside runs on the stream of this object, CuPy's work and PyTorch's."""
        self.cupy.cuda.Device().synchronize()
        with self.stream, torch_stream(self.stream):
            yield
        self.cupy.cuda.Device().synchronize()

    def clock(self, call) -> float:
        start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self.stream)
        call()
        stop.record(self.stream)
        stop.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, stop)

    def free(self) -> None:
        gc.collect()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def measure(gpu, row: Row, passes: str, contestants, repeats: int) -> dict:
    """Time one pass of a row: a dictionary as the JSON file has it."""
    found: dict = {"row": row.name, "group": row.group, "pass": passes}
    found |= {"floor_ms": floor_ms(row, passes), "failed": {}, "apart": {}, "prepare_s": {}}
    found["copies"] = copies_past_cache(row, gpu.cache_bytes)
    with gpu.current():
        _measure(gpu, row, passes, contestants, repeats, found)
    gpu.free()
    return found


def _measure(gpu, row: Row, passes: str, contestants, repeats: int, found: dict) -> None:
    runs: list[Run] = []
    copies, ours = found["copies"], None
    arrays = [draw(row, gpu.cupy, seed) for seed in range(copies)]
    for contestant in contestants:
        name, reason = contestant.name, contestant.refusal(row, passes)
        if reason:
            found["failed"][name] = reason
            continue
        start = time.perf_counter()
        try:
            built, result = prepare(contestant, arrays, passes)
            found["prepare_s"][name] = time.perf_counter() - start
            say(f"{row.name}, {passes}: {name} ready after {found['prepare_s'][name]:.1f} s")
            if contestant is contestants[0]:
                ours = result
            elif ours is not None:
                found["apart"][name] = apart(contestant, result, contestants[0], ours)
            del result
        except Exception as error:
            found["failed"][name] = one_line(error)
            continue
        runs.append(Run(name, "eager", all_calls(built, passes), copies))
        try:
            runs.append(Run(name, "graph", contestant.graph(built, passes, gpu.stream), copies))
        except Exception as error:
            found["failed"][f"{name} graph"] = one_line(error)
    found["failed"] |= take_turns(runs, gpu.clock, repeats)
    found |= summarise(runs)


def prepare(contestant, arrays: list[Inputs], passes: str):
    """Build a contestant per copy and run each once: compiles, tunes, fills every cache.

    Returns them and a result of the first, to be compared: o, or the gradient of v.
    """
    built = [contestant(x) for x in arrays]
    result = None
    for i, copy in enumerate(built):
        if passes == "backward":
            copy.prepare_backward()
        done = getattr(copy, passes)()
        if i == 0:
            result = done[2] if passes == "backward" else done
    contestant.synchronise()
    return built, result


def all_calls(built, passes: str):
    calls = [getattr(copy, passes) for copy in built]

    def once():
        for call in calls:
            call()

    return once


def apart(contestant, result, first, firsts) -> float | None:
    """Relative distance, in the Frobenius norm, of two contestants' results on the row itself."""
    try:
        x, y = contestant.float32(result).ravel(), first.float32(firsts).ravel()
        x -= y
        return float((x @ x) ** 0.5 / (y @ y) ** 0.5)
    except (MemoryError, RuntimeError):  # PyTorch's own lack of memory is a RuntimeError
        return None


class Errors:
    """Relative errors against the float64 operator of NumPy arrays, on shortened rows."""

    def __init__(self):
        self.known: dict[tuple, float] = {}
        self.exact: dict[tuple, list[np.ndarray]] = {}

    def of(self, contestant, row: Row, passes: str) -> float:
        """The error of o, or the largest of those of the gradients of q, k, v, beta and gates."""
        short = row.shortened()
        shape = (replace(short, group=""), passes)
        key = (contestant.name, *shape)
        if key not in self.known:
            inputs = draw(short, np, seed=1)
            if shape not in self.exact:
                self.exact = {shape: float64_results(inputs.wide(), passes)}
            copy = contestant(inputs)
            if passes == "forward":
                results = [contestant.host(copy.forward())]
            else:
                copy.prepare_backward()
                results = contestant.gradients_host(copy.backward(), short)
            self.known[key] = max(
                float(np.linalg.norm((x - y).ravel()) / np.linalg.norm(y.ravel()))
                for x, y in zip(results, self.exact[shape], strict=True)
            )
        return self.known[key]


def float64_results(inputs: Inputs, passes: str) -> list[np.ndarray]:
    """What the reference computes: o, or the gradients of q, k, v, beta and, if any, gates."""
    import cupy_delta

    arrays = (inputs.q, inputs.k, inputs.v, inputs.beta, inputs.g)
    forward = cupy_delta.chunk_delta_rule_fwd(*arrays, cu_seqlens=inputs.cu_seqlens)
    if passes == "forward":
        return [forward.o]
    gradients = cupy_delta.chunk_delta_rule_bwd(forward.residuals, inputs.do)
    return list(gradients[: 4 + inputs.row.gated])


def try_out(gpu, contestants, row: Row, passes) -> tuple[list, dict[str, str]]:
    """Who can run a small row here, and why the others cannot."""
    able, left_out = [], {}
    with gpu.current():
        for contestant in contestants:
            say(f"trying {contestant.name}")
            try:
                contestant(draw(row, gpu.cupy))  # also of one that refuses this row, if no other
                for each in passes:
                    if contestant.refusal(row, each) is None:
                        prepare(contestant, [draw(row, gpu.cupy)], each)
                able.append(contestant)
            except Exception as error:
                left_out[contestant.name] = one_line(error)
    return able, left_out
