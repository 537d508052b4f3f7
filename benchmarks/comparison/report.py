"""The report: lines while it runs, a Markdown page and a figure from the JSON file."""

from __future__ import annotations

import textwrap

from .contestants import CONTESTANTS
from .rows import BYTES_PER_SECOND, FLOOR_CHUNK, FLOP_PER_SECOND, MEAN_DECAY, PASSES

COLOURS = {
    "cupy_delta": "#d1495b",
    "fla": "#30638e",
    "fla_gated": "#7fa7c9",
    "flash_qla": "#edae49",
    "flashinfer": "#3c8d5a",
    "fla_kda": "#30638e",
    "cudnn": "#6b4c9a",
}
MARKERS = dict(zip(COLOURS, "Dosv^sP", strict=True))
# Of a row's height in the figure, what its contestants share: each has a line of its own, so that
# equal times do not cover each other.
SPREAD = 0.7


def time_of(row: dict, name: str) -> float | None:
    """Milliseconds of the replayed graph, or of eager calls where no graph could be captured."""
    return row["ms"].get(name, row["eager_ms"].get(name))


def cell(row: dict, name: str) -> str:
    """The time, bold where it is the least of the row; an e marks eager calls."""
    own = time_of(row, name)
    if own is None:
        return "-"
    least = min(t for n in CONTESTANTS if (t := time_of(row, n)) is not None)
    text = f"{own:.3f}" if own < 10 else f"{own:.1f}"
    text = f"**{text}**" if own == least else text
    return text if name in row["ms"] else text + " e"


def ratios(row: dict) -> list[str]:
    """The best peer's time over ours, and ours over the floor."""
    ours = time_of(row, "cupy_delta")
    if ours is None:
        return ["-", "-"]
    peers = [t for n in CONTESTANTS if n != "cupy_delta" and (t := time_of(row, n)) is not None]
    return [f"{min(peers) / ours:.2f}" if peers else "-", f"{ours / row['floor_ms']:.1f}"]


def line(row: dict) -> str:
    """One row in one line, for the terminal."""
    parts = [f"floor {row['floor_ms']:.3f}"]
    for name in CONTESTANTS:
        if (own := time_of(row, name)) is not None:
            eager = row["eager_ms"].get(name)
            both = f"{own:.3f} ({eager:.3f})" if eager is not None else f"{own:.3f}"
            error = row["error"].get(name)
            parts.append(f"{name} {both}" + (f" error {error:.1e}" if error is not None else ""))
    parts += [f"{name}: {reason}" for name, reason in row["failed"].items()]
    return f"{row['row']}, {row['pass']}: " + " | ".join(parts)


def present(report: dict) -> list[str]:
    """Contestants with at least one time."""
    rows = report["rows"]
    return [n for n in CONTESTANTS if any(time_of(row, n) is not None for row in rows)]


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def markdown(report: dict) -> str:
    names = present(report)
    versions = ", ".join(f"{n} {v}" for n, v in report["versions"].items())
    lines = [
        f"# The chunked delta rule on {report['gpu']}",
        "",
        f"Driver {report['driver']}; {versions}. bfloat16, beta in float32, K = V = 128 unless a "
        "row says d64, d256 or k96 v192, beta in (0, 1) or up to what the row says; h16/64: 16 "
        "heads of q and k, 64 of v; gated: with a log decay per token and value head, exponential "
        f"in distribution, with mean {-MEAN_DECAY} or, negative, what the row says. Milliseconds, "
        f"medians over {report['repeats']} repeats in which the "
        "contestants took turns, of CUDA graph replays (e: eager calls, where no graph could be "
        "captured), on inputs that together are three times as large as the L2 cache.",
        "",
    ]
    for passes in PASSES:
        rows = [row for row in report["rows"] if row["pass"] == passes]
        if not rows:
            continue
        lines += [f"## {passes.capitalize()}", ""]
        header = ["tokens, heads", "floor", *names, "best peer / ours", "ours / floor"]
        lines += markdown_table(
            header,
            [
                [r["row"], f"{r['floor_ms']:.3f}", *(cell(r, n) for n in names), *ratios(r)]
                for r in rows
            ],
        )
        lines += ["Eager calls in ms; spread of the replays over the repeats; relative error.", ""]
        lines += markdown_table(
            ["tokens, heads", *names], [[r["row"], *(details(r, n) for n in names)] for r in rows]
        )
    lines += costs(report)
    lines += remarks(report, names)
    return "\n".join(lines)


def details(row: dict, name: str) -> str:
    if time_of(row, name) is None:
        return "-"
    eager, spread = row["eager_ms"].get(name), row["spread"].get(name)
    error = row["error"].get(name)
    parts = [
        "-" if eager is None else f"{eager:.3f}",
        "-" if spread is None else f"{spread:.0%}",
        "-" if error is None else f"{error:.1e}",
    ]
    return "; ".join(parts)


def costs(report: dict) -> list[str]:
    kinds = {"first_call_s": "first result, s (empty caches; warm)", "host_us": "host us per call"}
    kinds["install_mb"] = "installed MB, with what it requires"
    if not any(report.get(kind) for kind in kinds):
        return []
    rows = []
    for name in CONTESTANTS:
        first = (report.get("first_call_s") or {}).get(name, {})
        seconds = "; ".join(f"{first[s]:.1f}" for s in ("cold", "warm") if s in first) or "-"
        cells = [seconds]
        for kind in ("host_us", "install_mb"):
            value = (report.get(kind) or {}).get(name)
            cells.append("-" if value is None else f"{value:.0f}")
        if any(c != "-" for c in cells):
            rows.append([name, *cells])
    return ["## Beside the kernels", "", *markdown_table(["", *kinds.values()], rows)]


def remarks(report: dict, names: list[str]) -> list[str]:
    lines = ["## What was timed", ""]
    lines += [f"- {n}: {CONTESTANTS[n].notes}" for n in names if CONTESTANTS[n].notes]
    lines += [
        f"- floor: the larger of FLOP at {FLOP_PER_SECOND / 1e12:.0f} TFLOP/s and bytes at "
        f"{BYTES_PER_SECOND / 1e12:.1f} TB/s (both assumed), in chunks of {FLOOR_CHUNK}",
        "- error: in the Frobenius norm against float64, on the same heads and width with at most "
        "512 tokens; of a backward the largest of the gradients of q, k, v and beta",
    ]
    distances = [
        (d, f"{row['row']}, {row['pass']}, {name}")
        for row in report["rows"]
        for name, d in row["apart"].items()
        if d is not None
    ]
    if distances:
        worst = max(distances)
        lines.append(
            f"- results on the rows themselves differ from ours by at most {worst[0]:.1e} "
            f"({worst[1]})"
        )
    lines += [f"- left out: {n} ({why})" for n, why in report["left_out"].items()]
    seen: dict[tuple[str, str], int] = {}
    for row in report["rows"]:
        for name, reason in row["failed"].items():
            key = (f"{name}, {row['pass']}", reason)
            seen[key] = seen.get(key, 0) + 1
    lines += [f"- {n} rows without {who}: {why}" for (who, why), n in seen.items()]
    if report["not_measured"]:
        lines.append("- not measured, time was up: " + ", ".join(report["not_measured"]))
    return [*lines, ""]


def offset(row: dict, name: str, names: list[str]) -> float:
    """Where the line of a contestant lies within its row, from the middle."""
    present = [n for n in names if time_of(row, n) is not None]
    return SPREAD * ((present.index(name) + 0.5) / len(present) - 0.5)


def figure(report: dict):
    """Times of both passes on a logarithmic axis, with the floor of every row."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = present(report)
    panels = {p: [r for r in report["rows"] if r["pass"] == p] for p in PASSES}
    panels = {p: rows for p, rows in panels.items() if rows}
    most = max(len(rows) for rows in panels.values())
    height = 1.6 + 0.4 * most
    page = Figure(figsize=(6.2 * len(panels), height), layout="constrained")
    for axes, (passes, rows) in zip(
        page.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        y = range(len(rows))
        axes.scatter(
            [r["floor_ms"] for r in rows], y, marker="|", s=200, c="black", label="floor", zorder=2
        )
        for i in y[::2]:
            axes.axhspan(i - 0.5, i + 0.5, color="0.96", linewidth=0, zorder=0)
        for name in names:
            points = [
                (t, i + offset(r, name, names))
                for i, r in enumerate(rows)
                if (t := time_of(r, name)) is not None
            ]
            if points:
                axes.scatter(
                    *zip(*points, strict=True),
                    marker=MARKERS[name],
                    s=24,
                    c=COLOURS[name],
                    label=name,
                    zorder=4 if name == "cupy_delta" else 3,
                )
        axes.set_yticks(list(y), [r["row"] for r in rows], fontsize=8)
        axes.set_ylim(most - 0.5, -0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="0.85", zorder=0)
        axes.set_axisbelow(True)
        axes.set_xlabel("milliseconds")
        axes.set_title(passes, fontsize=10)
        if passes == PASSES[0] or len(panels) == 1:  # every contestant has a forward
            handles, labels = axes.get_legend_handles_labels()
    page.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    versions = report["versions"]
    packages = ("cupy_delta", "torch", "triton", "fla-core", "flash_qla", "flashinfer-python")
    packages += ("nvidia-cudnn-frontend",)
    # No line ends between a name and its version.
    named = ", ".join(f"{n}\N{NO-BREAK SPACE}{versions[n]}" for n in packages if n in versions)
    title = f"{report['gpu']}, driver {report['driver']}\n{textwrap.fill(named, 72)}"
    page.suptitle(title, fontsize=8)
    return page
