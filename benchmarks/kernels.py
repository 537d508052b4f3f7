"""What each kernel of a call takes on a GPU: events around every launch, sums per call, medians.

A kernel that runs beside the next one, on a stream of its own, counts with that one. Between
launches the GPU waits for the host, so sums are of kernels alone and no call takes as little.

    python benchmarks/kernels.py --rows channel --passes backward
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from comparison.contestants import Ours
from comparison.rows import PASSES, chosen, draw


@contextmanager
def every_launch(device: type, event: Callable) -> Iterator[list]:
    """Record (kernel, event before it, event after it) of every launch of a class of devices."""
    found: list[tuple] = []
    launch = device.launch  # type: ignore[attr-defined]

    def timed(self, one, arrays):
        start, stop = event(), event()
        start.record()
        launch(self, one, arrays)
        stop.record()
        found.append((one.entry, start, stop))

    device.launch = timed  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        device.launch = launch  # type: ignore[attr-defined]


def medians(calls: list[list[tuple[str, float]]]) -> dict[str, float]:
    """Return of every kernel the median over calls of what its launches take together."""
    sums: dict[str, list[float]] = {}
    for n, call in enumerate(calls):
        for name, spent in call:
            sums.setdefault(name, [0.0] * len(calls))[n] += spent
    return {name: statistics.median(spent) for name, spent in sums.items()}


def measure(row, passes: str, repeats: int) -> dict[str, float]:
    """Time the kernels of one pass of a row, in milliseconds."""
    import cupy

    from cupy_delta.cuda.runtime.device import CupyDevice

    ours = Ours(draw(row, cupy))
    if passes == "backward":
        ours.prepare_backward()
    call, calls = getattr(ours, passes), []
    call()  # compiles
    for _ in range(repeats):
        with every_launch(CupyDevice, cupy.cuda.Event) as found:
            call()
        cupy.cuda.Device().synchronize()
        calls.append([(name, cupy.cuda.get_elapsed_time(a, b)) for name, a, b in found])
    return medians(calls)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["channel"], help="as in compare.py")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    from cupy_delta.commands.console import gpu_problem

    rows = chosen(args.rows)
    if not rows:
        print(f"no row matches {' '.join(args.rows)}", file=sys.stderr)
        return 2
    if problem := gpu_problem():
        print(f"no GPU can be used: {problem}", file=sys.stderr)
        return 2
    for row in rows:
        for passes in args.passes:
            found = measure(row, passes, args.repeats)
            parts = ", ".join(f"{name} {spent:.3f}" for name, spent in found.items())
            print(f"{row.name}, {passes}: {sum(found.values()):.3f} ms: {parts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
