"""Tables, progress and devices, shared by the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from ..arrays import FLOAT_DTYPES
from .output import tell


def print_table(header: list[str], rows: Iterable[list], file=None) -> None:
    """Print columns, numbers to the right and text to the left."""
    cells = [header, *([str(x) for x in row] for row in rows)]
    widths = [max(len(row[j]) for row in cells) for j in range(len(header))]
    numeric = [
        all(row[j][:1].isdigit() or row[j] in ("-", "nan", "inf") for row in cells[1:])
        for j in range(len(header))
    ]
    for i, row in enumerate(cells):
        line = "  ".join(
            x.rjust(w) if right else x.ljust(w)
            for x, w, right in zip(row, widths, numeric, strict=True)
        )
        print(line.rstrip(), file=file)
        if i == 0:
            print("  ".join("-" * w for w in widths), file=file)


def progress(items: list, label: str) -> Iterator:
    """Yield the items and show how far it is: a bar with rich on a terminal, else a few lines."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            pass
        else:
            yield from track(items, label, console=Console(stderr=True), transient=True)
            return
    step = max(1, len(items) // 5)
    for i, item in enumerate(items):
        yield item
        if (i + 1) % step == 0 or i + 1 == len(items):
            tell(f"{label}: {i + 1}/{len(items)}")


def positive(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    """Parse comma-separated positive integers."""
    return [positive(part) for part in text.split(",")]


def seed(text: str) -> int:
    """Parse the seed of random numbers."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def add_seed(parser) -> None:
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the random data (default: 0)"
    )


def add_device(parser, default: str = "auto") -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default=default,
        help="where arrays live; auto takes a GPU if CuPy finds one (default: %(default)s)",
    )


class Device:
    """Where a command's arrays live: `to` and `back` carry them there and to NumPy."""

    def __init__(self, choice: str):
        from .main import CommandError

        reason = None if choice == "cpu" else gpu_problem()
        if choice == "gpu" and reason:
            raise CommandError(f"no GPU can be used: {reason}")
        self.name = "cpu" if choice == "cpu" or reason else "gpu"

    def to(self, x):
        if x is None or self.name == "cpu":
            return x
        import cupy

        return cupy.asarray(x)

    def back(self, x):
        return x if x is None or isinstance(x, np.ndarray) else x.get()

    def synchronise(self) -> None:
        if self.name == "gpu":
            import cupy

            cupy.cuda.get_current_stream().synchronize()


def gpu_problem() -> str | None:
    """Why CuPy arrays cannot be used here, in one line; None if they can."""
    from ..cuda import environment

    return environment()["problem"]


# Exit status of a command whose outputs hold Inf or NaN.
NOT_FINITE = 3
STATES = ("final_state", "initial_state", "state")


def not_finite(results: dict) -> str | None:
    """Say how many values of each result are not finite, and where the first is; None if all are.

    Results are named: states (N, HV, ., .), others (B, T, heads, ...).
    """
    found = []
    for name, x in results.items():
        bad = ~np.isfinite(x)
        if bad.any():
            axes = ("sequence", "head") if name in STATES else ("batch row", "token", "head")
            first = np.unravel_index(np.argmax(bad), x.shape)
            place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, first, strict=False))
            found.append(f"{np.sum(bad)} of {x.size} values of {name}, the first at {place}")
    return "; ".join(found) or None


def random_inputs(rng, dtype: str, T, *, B=1, H=1, HV=1, K=64, V=64, beta=(0.0, 1.0)):
    """Return q, k (of unit length), v and beta as NumPy arrays of the named dtype."""
    kind = FLOAT_DTYPES[dtype]
    q, k = (rng.standard_normal((B, T, H, K), np.float32) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((B, T, HV, V), np.float32)
    return [x.astype(kind) for x in (q, k, v, rng.uniform(*beta, (B, T, HV)))]
