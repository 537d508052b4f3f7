"""Time the operators over a grid of shapes.

Prints tokens/s, FLOP/s and bytes/s per row, of the fewest operations that the chunkwise form takes
and of every input read and every output written once.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from ..arrays import FLOAT_DTYPES
from ..extras import EXTRAS, install_command
from ..operators import chunk_delta_rule, chunk_delta_rule_bwd, chunk_delta_rule_fwd
from ..version import __version__
from .console import (
    Device,
    add_device,
    add_seed,
    positive,
    positives,
    print_table,
    progress,
    random_inputs,
)
from .output import (
    check_different,
    check_json,
    check_picture,
    save_figure,
    text_beside,
    write_json,
)


def add_arguments(parser) -> None:
    add_device(parser)
    grid = dict(type=positives, metavar="N[,N...]")
    shown = "(default: %(default)s)"
    parser.add_argument("-T", "--tokens", default="512,2048,8192", **grid, help=f"tokens T {shown}")
    parser.add_argument("-H", "--heads", default="16", **grid, help=f"heads H = HV {shown}")
    parser.add_argument("-D", "--head-size", default="128", **grid, help=f"K = V {shown}")
    parser.add_argument("-B", "--batch", default=1, type=positive, help=f"batch B {shown}")
    parser.add_argument(
        "--dtype", default="float32", choices=list(FLOAT_DTYPES), help=f"of the inputs {shown}"
    )
    add_seed(parser)
    parser.add_argument("--backward", action="store_true", help="time the gradients, too")
    parser.add_argument("--repeats", default=5, type=positive, help=f"timed runs per row {shown}")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the rows as JSON; - is the output"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw tokens/s over T (needs matplotlib)")


def work(passes: str, T: int, heads: int, K: int, V: int, itemsize: int, chunk: int = 64):
    """Count the work of one pass over T tokens of all batch rows.

    Parameters
    ----------
    passes : {"forward", "backward"}
    T, heads, K, V : int
        Tokens over all batch rows, heads and head sizes.
    itemsize : int
        Bytes per element of q, k, v and o.
    chunk : int
        Tokens per chunk C.

    Returns
    -------
    flop : float
        Forward: three products with the state (2 K V each per token), two C x C x K and two
        C x C x V products per chunk of which half is needed (2 C (K + V) per token) and the
        solve's share. Backward: seven and nine such products.
    bytes : float
        Every input read once and every output written once; states are left out.

    Notes
    -----
    The fewest operations of the chunkwise form, not those that a backend happens to execute.
    """
    tokens = T * heads
    if passes == "forward":
        return tokens * (6 * K * V + 2 * chunk * (K + V)), tokens * (2 * (K + V) * itemsize + 4)
    flop = tokens * (14 * K * V + 9 * chunk * (K + V) / 2)
    return flop, tokens * ((4 * K + 3 * V) * itemsize + 8)


def run_command(args) -> int:
    device = Device(args.device)
    plt = None if args.plot is None else _pyplot()
    check_json(args.output)
    if plt:
        check_picture(args.plot)
    check_different(args.output, args.plot)
    shown = text_beside(args.output)
    grid = [(D, H, T) for D in args.head_size for H in args.heads for T in args.tokens]
    rows = []
    for D, H, T in progress(grid, "timing"):
        for passes, seconds in _time(args, device, T, H, D).items():
            flop, size = work(passes, T * args.batch, H, D, D, FLOAT_DTYPES[args.dtype].itemsize)
            median = statistics.median(seconds)
            rows.append(
                {
                    "pass": passes,
                    "B": args.batch,
                    "T": T,
                    "H": H,
                    "D": D,
                    "ms": median * 1e3,
                    "spread": (max(seconds) - min(seconds)) / median,
                    "tokens_per_s": T * args.batch / median,
                    "gflop_per_s": flop / median / 1e9,
                    "gb_per_s": size / median / 1e9,
                }
            )
    header = ["pass", "B", "T", "H", "D", "ms", "spread", "tokens/s", "GFLOP/s", "GB/s"]
    formats = ["", "", "", "", "", ".2f", ".0%", ",.0f", ".1f", ".2f"]
    print(f"{args.dtype} on the {device.name}, median of {args.repeats}", file=shown)
    cells = [[format(x, f) for x, f in zip(r.values(), formats, strict=True)] for r in rows]
    print_table(header, cells, shown)
    if args.output:
        report = dict(version=__version__, device=device.name, dtype=args.dtype, rows=rows)
        write_json(args.output, report)
    if plt:
        _draw(plt, rows, args)
    return 0


def _time(args, device: Device, T: int, H: int, D: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(args.seed)
    inputs = random_inputs(rng, args.dtype, T, B=args.batch, H=H, HV=H, K=D, V=D)
    inputs = [device.to(x) for x in inputs]

    def clock(function) -> list[float]:
        function()
        seconds = []
        for _ in range(args.repeats):
            device.synchronise()
            start = time.perf_counter()
            function()
            device.synchronise()
            seconds.append(time.perf_counter() - start)
        return seconds

    times = {"forward": clock(lambda: chunk_delta_rule(*inputs))}
    if args.backward:
        forward = chunk_delta_rule_fwd(*inputs)
        do = device.to(rng.standard_normal(inputs[2].shape).astype(inputs[2].dtype))
        times["backward"] = clock(lambda: chunk_delta_rule_bwd(forward.residuals, do))
    return times


def _pyplot():
    from .main import CommandError

    try:
        import matplotlib
    except ImportError as error:
        needs = install_command(*EXTRAS["plot"])
        raise CommandError(f"--plot needs matplotlib: {needs}") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw(plt, rows: list[dict], args) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key in sorted({(r["pass"], r["H"], r["D"]) for r in rows}, reverse=True):
        line = [r for r in rows if (r["pass"], r["H"], r["D"]) == key]
        label = f"{key[0]}, H = {key[1]}, K = V = {key[2]}"
        axes.plot([r["T"] for r in line], [r["tokens_per_s"] for r in line], "o-", label=label)
    axes.set(xscale="log", xlabel="tokens T", ylabel="tokens per second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"cupy_delta, {args.dtype}, B = {args.batch}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, args.plot)
    plt.close(figure)
