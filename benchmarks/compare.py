"""The chunked delta rule on a GPU beside its peers and its floor, in one process.

Contestants: cupy_delta; flash-linear-attention (its delta rule, and its gated one); FlashQLA;
FlashInfer's gated delta rule prefill; for gates per key channel the KDA of flash-linear-attention
and of cuDNN frontend. Where a row has no gate, gated ones are given g = 0, or none.
Each that can be imported takes its turn on the same arrays in every repeat. Timed by CUDA events:
replays of CUDA graphs and eager calls, on inputs that the L2 cache has forgotten. A row is printed
and the JSON file rewritten as soon as it is measured; beside the JSON file lie a Markdown page and
a figure of the same name.

    python benchmarks/compare.py -o benchmarks/results/DATE-GPU-compare.json
    python benchmarks/compare.py --rows equal '1x32768*' --passes backward --peers fla
    python benchmarks/compare.py --render benchmarks/results/DATE-GPU-compare.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from comparison import costs
from comparison.contestants import CONTESTANTS, Ours
from comparison.report import figure, line, markdown
from comparison.rows import PASSES, ROWS, chosen, floor_ms, tiny
from comparison.timing import Errors, Gpu, measure, one_line, try_out

PEERS = [name for name in CONTESTANTS if name != Ours.name]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = sorted({row.group for row in ROWS})
    parser.add_argument(
        "--rows", nargs="+", default=[], help=f"patterns of names, or of {', '.join(groups)}"
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=3600, help="start no row after S seconds")
    parser.add_argument("--first-call", action="store_true", help="time new processes, too")
    parser.add_argument("--list", action="store_true", help="print the rows and their floors")
    parser.add_argument("--render", metavar="JSON", help="only rewrite the page and the figure")
    parser.add_argument("--first-result-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", help="JSON file")
    return parser.parse_args(argv)


def run(gpu, contestants: list, rows: list, args, save) -> dict:
    """Measure; `save` is called with the report after every row."""
    start = time.monotonic()
    small = tiny(rows[0])
    able, left_out = try_out(gpu, contestants, small, args.passes)
    for name, reason in left_out.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    report: dict = {"gpu": gpu.name, "driver": costs.driver(), "versions": costs.versions()}
    report |= {"repeats": args.repeats, "left_out": left_out, "first_call_s": {}, "host_us": {}}
    sizes = {c.name: costs.installed_mb(c) for c in able}
    report["install_mb"] = {name: size for name, (size, _) in sizes.items()}
    report["install_missing"] = {name: missing for name, (_, missing) in sizes.items() if missing}
    for contestant in (c for c in able if c.refusal(small, "forward") is None):
        report["host_us"][contestant.name] = costs.host_microseconds(gpu, contestant, small)
    report |= {"rows": [], "not_measured": []}
    save(report)
    errors = Errors()
    for row in rows:
        for passes in args.passes:
            if time.monotonic() - start > args.budget:
                report["not_measured"].append(f"{row.name} {passes}")
                continue
            try:
                found = measure(gpu, row, passes, able, args.repeats)
            except Exception as error:  # too little memory for the arrays, say
                gpu.free()
                print(f"{row.name}, {passes}: {one_line(error)}", file=sys.stderr)
                report["not_measured"].append(f"{row.name} {passes} ({one_line(error)})")
                continue
            found["error"] = {}
            for contestant in able:
                if contestant.name in found["eager_ms"] or contestant.name in found["ms"]:
                    try:
                        found["error"][contestant.name] = errors.of(contestant, row, passes)
                    except Exception as error:
                        found["failed"][f"{contestant.name} error"] = one_line(error)
            report["rows"].append(found)
            print(line(found), flush=True)
            save(report)
    if args.first_call:
        report["first_call_s"] = costs.first_call([c.name for c in able], __file__)
    save(report)
    return report


def write(path: str, report: dict) -> None:
    """Write the page and the figure beside the JSON file."""
    from cupy_delta.commands.output import save_figure, whole_file

    stem = os.path.splitext(path)[0]
    with whole_file(stem + ".md") as file:
        file.write(markdown(report).encode())
    if not report["rows"]:
        return
    try:
        save_figure(figure(report), stem + ".png")
    except ImportError as error:
        print(f"no figure: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.first_result_of:
        costs.first_result(args.first_result_of)
        return 0
    if args.render:
        report = json.loads(Path(args.render).read_text())
        write(args.render, report)
        print(markdown(report))
        return 0
    # Not at the top: a peer's first call imports no more than it needs.
    from cupy_delta.commands.console import gpu_problem, print_table
    from cupy_delta.commands.output import write_json

    rows = chosen(args.rows)
    if not rows:
        print(f"no row matches {' '.join(args.rows)}", file=sys.stderr)
        return 2
    if args.list:
        floors = ([r.group, r.name, *(f"{floor_ms(r, p):.3f}" for p in PASSES)] for r in rows)
        print_table(["group", "row", "forward floor, ms", "backward floor, ms"], floors)
        return 0

    if problem := gpu_problem():
        print(f"no GPU can be used: {problem}", file=sys.stderr)
        return 2

    def save(report: dict) -> None:
        if args.output:
            write_json(args.output, report)

    contestants = [Ours, *(CONTESTANTS[name] for name in args.peers)]
    report = run(Gpu(), contestants, rows, args, save)
    print()
    print(markdown(report))
    if args.output:
        write(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
