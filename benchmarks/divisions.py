"""Divisions of the forward on compute capability 9.0: each one timed, beside the chosen one.

Rows and times as in compare.py, by graph replay. With --fit, the constants of
cupy_delta/cuda/sm90/cost.py under which its predictions are nearest to these times.

    python benchmarks/divisions.py --fit
    python benchmarks/divisions.py --rows gated '1x8192*' --near 1.3
"""

from __future__ import annotations

import argparse
import math
import statistics

from comparison.contestants import Ours
from comparison.rows import chosen, copies_past_cache, draw
from comparison.timing import Gpu

from cupy_delta.commands.console import print_table
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.sm90 import cost

ROWS = ["1x32768 h2/8", "1x32768 h8/32", "1x32768 h16/64", "4x8192 h16/64", "1x8192 h2/8"]
CONSTANTS = ("LAUNCH", "CONCURRENT", "JOIN")


class Division:
    """Stands in for the choice; remembers of which call it was asked for."""

    def __init__(self):
        self.choice = self.call = self.facts = None
        self.own = cost.choose_forward
        cost.choose_forward = self
        plans.plan = plans.made  # a plan that is kept has another division

    def __call__(self, call, facts):
        self.call, self.facts = call, facts
        return self.own(call, facts) if self.choice is None else self.choice


def microseconds(gpu, row, repeats: int = 5) -> float:
    copies = copies_past_cache(row, gpu.cache_bytes)
    with gpu.current():
        built = [Ours(draw(row, gpu.cupy, seed)) for seed in range(copies)]
        once = Ours.graph(built, "forward", gpu.stream)
        gpu.clock(once)
        times = [gpu.clock(once) for _ in range(repeats)]
    gpu.free()
    return 1e3 * statistics.median(times) / copies


def predicted(division, choice, rates) -> float:
    return cost.cost(choice, division.call, division.facts, rates, 0.0)


def measure(gpu, row, division, near: float) -> list[tuple]:
    """Return (call, facts, choice, microseconds); the first of them is the chosen one."""
    division.choice = None
    times = [microseconds(gpu, row)]
    call, facts = division.call, division.facts
    best = division.own(call, facts)
    found = [(call, facts, best, times[0])]
    least = predicted(division, best, cost.FORWARD)
    for choice in set(cost.choices(call, cost.FORWARD)) - {best}:
        if predicted(division, choice, cost.FORWARD) < near * least:
            division.choice = choice
            found.append((call, facts, choice, microseconds(gpu, row)))
    return found


def fit(measured: list[tuple]) -> dict[str, float]:
    """Lower the squared logarithms of predicted over measured, one constant after the other."""
    rates = cost.FORWARD
    values = {f"walk {n}": x for n, x in rates.walk.items()}
    values |= {f"transfer {n}": x for n, x in rates.transfer.items()}
    values |= {"given": rates.given_walk, "concurrent": rates.concurrent_walk[1]}
    values |= {name: getattr(cost, name) for name in CONSTANTS}

    def loss() -> float:
        for name in CONSTANTS:
            setattr(cost, name, values[name])
        tried = cost.Rates(
            {n: values[f"walk {n}"] for n in rates.walk},
            {n: values[f"transfer {n}"] for n in rates.transfer},
            {1: values["concurrent"], 2: values["walk 2"]},
            values["given"],
        )
        return sum(
            math.log(cost.cost(choice, call, facts, tried, 0.0) / time) ** 2
            for call, facts, choice, time in measured
        )

    step, best = 0.1, loss()
    while step > 0.002:
        before = best
        for name in values:
            for factor in (1 + step, 1 / (1 + step)):
                kept = values[name]
                values[name] = kept * factor
                now = loss()
                best, values[name] = (now, values[name]) if now < best else (best, kept)
        step = step if best < before else step / 2
    return values | {"error": math.sqrt(best / len(measured))}


def describe(choice) -> str:
    parts = f"{choice.value_tiles} tiles, {choice.segments} segments of {choice.transfer_tiles}"
    return parts + f", first {choice.concurrent}" * bool(choice.concurrent) + ", X" * choice.reuse_x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, help="as compare.py has them")
    parser.add_argument("--near", type=float, default=1.25, help="of the least predicted time")
    parser.add_argument("--fit", action="store_true", help="fit the constants of the prediction")
    args = parser.parse_args()
    gpu, division, measured = Gpu(), Division(), []
    table = []
    for row in chosen(args.rows):
        found = measure(gpu, row, division, args.near)
        measured += found
        fastest = min(found, key=lambda x: x[3])
        for name, (_, _, choice, time) in (("chosen", found[0]), ("fastest", fastest)):
            prediction = predicted(division, choice, cost.FORWARD)
            table.append([row.name, name, describe(choice), f"{time:.0f}", f"{prediction:.0f}"])
    print_table(["row", "", "division", "microseconds", "predicted"], table)
    if args.fit:
        for name, value in fit(measured).items():
            print(f"{name:12} {value:.3f}")


if __name__ == "__main__":
    main()
