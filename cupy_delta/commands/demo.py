"""Show what the delta rule is for: a memory that can be overwritten.

Keys are bound to values, then bound again and again to new ones. Recall asks for the latest value
of each key, of a memory written by the delta rule and of one that only adds (linear attention).
"""

from __future__ import annotations

import numpy as np

from ..extras import EXTRAS, install_command
from ..operators import chunk_delta_rule
from .console import add_seed, print_table
from .output import check_output, check_picture, save_figure

KEYS, K, V, ROUNDS = 16, 256, 32, 12


def add_arguments(parser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="cupy_delta_demo.png",
        metavar="PNG",
        help="picture to write (default: %(default)s)",
    )
    add_seed(parser)


def simulate(seed: int):
    """Bind every key anew in each round and recall all keys after each round.

    Returns
    -------
    truth, delta, additive : array, (ROUNDS, KEYS, V)
        The latest values, and what either memory recalls.
    """
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((KEYS, K))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    truth = rng.standard_normal((ROUNDS, KEYS, V))
    state, added = np.zeros((1, 1, K, V)), np.zeros((K, V))
    delta, additive = np.empty_like(truth), np.empty_like(truth)
    k = keys[None, :, None, :]
    for r, values in enumerate(truth):
        v = values[None, :, None, :]
        _, state = chunk_delta_rule(k, k, v, np.ones((1, KEYS, 1)), initial_state=state)
        added = added + keys.T @ values
        delta[r], additive[r] = keys @ state[0, 0], keys @ added
    return truth, delta, additive


def run_command(args) -> int:
    can_draw = _has_matplotlib()
    (check_picture if can_draw else check_output)(args.output)
    truth, delta, additive = simulate(args.seed)
    errors = [_error(x, truth) for x in (delta, additive)]
    print(f"{KEYS} keys of length {K}, each bound to a new value {ROUNDS} times.")
    print("Relative error of recalling the latest value of every key:\n")
    rows = [[r + 1, f"{d:.2f}", f"{a:.2f}"] for r, (d, a) in enumerate(zip(*errors, strict=True))]
    print_table(["times bound", "delta rule", "additive"], [r for r in rows if r[0] in _SHOWN])
    print("\nThe delta rule replaces what a key held; a sum keeps every old value.")
    if not can_draw:
        print(f"No picture, it needs matplotlib: {install_command(*EXTRAS['plot'])}")
        return 0
    _draw(args.output, truth, delta, additive, errors)
    print(f"Picture: {args.output}")
    return 0


def _has_matplotlib() -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


_SHOWN = (1, 2, 3, 4, 6, 8, 10, 12)


def _error(recalled, truth):
    norm = np.linalg.norm(truth, axis=(1, 2))
    return np.linalg.norm(recalled - truth, axis=(1, 2)) / norm


def _draw(path: str, truth, delta, additive, errors) -> None:
    import matplotlib.pyplot as plt

    page = plt.figure(figsize=(11, 4.6), layout="constrained")
    left, right = page.subfigures(1, 2, width_ratios=(1.75, 1), wspace=0.03)
    images = left.subplots(1, 3)
    panels = ((truth, "latest values"), (delta, "delta rule"), (additive, "additive"))
    limit = np.max(np.abs(truth[-1]))
    for j, (x, title) in enumerate(panels):
        axes = images[j]
        image = axes.imshow(
            x[-1], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axes.set(title=title, xlabel="value channel", xticks=[0, V - 1], yticks=[])
        if j == 0:
            axes.set(ylabel="key", yticks=[0, KEYS - 1])
    # The additive memory recalls more than the colours reach: they are those of the true values.
    bar = dict(location="bottom", shrink=0.6, aspect=30, extend="both")
    left.colorbar(image, ax=images, label="recalled value", **bar)
    axes = right.subplots()
    rounds = np.arange(1, ROUNDS + 1)
    axes.plot(rounds, errors[1], "s-", color="tab:red", label="additive (linear attention)")
    axes.plot(rounds, errors[0], "o-", color="tab:blue", label="delta rule")
    axes.set(xlabel="times every key was bound", ylabel="relative recall error", ylim=(0, None))
    axes.set_title("recalling the latest value")
    axes.grid(alpha=0.3)
    axes.legend()
    page.suptitle(f"{KEYS} keys, each bound to a new value {ROUNDS} times: what is recalled")
    save_figure(page, path)
    plt.close(page)
