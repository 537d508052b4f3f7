"""Cancel an echo in two microphones, block by block, with the delta rule as NLMS filter.

What a loudspeaker plays comes back to two microphones through the echoes of a room. A filter per
microphone learns these echoes from what is played, and takes its prediction away; half way through,
a door opens and everything has to be learned again. Both microphones are value channels of one
state (K = taps, V = 2), three step sizes are value heads, and the weights go from block to block as
the initial state, as in a program that runs while somebody speaks.

What is taken away must be predicted before it is heard: filters.py says how. The result is compared
with a loop over samples as textbooks have it.

Run ``python examples/echo_canceller.py``; the picture needs matplotlib: the extra ``examples``.
With ``--device gpu`` the same calls get CuPy arrays, in float32.
"""

from __future__ import annotations

import sys

import numpy as np
from filters import adapt, nlms_step, regressors
from surroundings import parser_of, save_figure, surroundings

RATE, SECONDS, BLOCK = 4000, 4, 500
TAPS, MICROPHONES = 64, 2
STEP_SIZES = (0.1, 0.5, 1.0)
EPS = 1e-3
NOISE = 0.1
TOLERANCE = {"cpu": 1e-9, "gpu": 1e-5}


def record(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return what is played, (T,), and what both microphones hear, (T, 2)."""
    rng = np.random.default_rng(seed)
    T = RATE * SECONDS
    played = rng.standard_normal(T)
    for t in range(1, T):  # speech has more low tones than high ones
        played[t] += 0.7 * played[t - 1]
    decay = np.exp(-np.arange(TAPS) / 12)[:, None]
    rooms = rng.standard_normal((2, TAPS, MICROPHONES)) * decay
    x = regressors(played, TAPS)
    heard = np.concatenate([x[: T // 2] @ rooms[0], x[T // 2 :] @ rooms[1]])
    return played, heard + NOISE * rng.standard_normal(heard.shape)


def cancel(x, d, asarray=np.asarray) -> np.ndarray:
    """Return what is left of d, (T, M, V), for every step size, block by block."""
    left, weights = [], None
    for start in range(0, len(x), BLOCK):
        block = slice(start, start + BLOCK)
        beta = nlms_step(x[block], STEP_SIZES, EPS).astype(x.dtype)
        predicted, weights = adapt(x[block], d[block], beta, weights=weights, asarray=asarray)
        left.append(d[block, None] - predicted)
    return np.concatenate(left)


def textbook(x, d, mu: float) -> np.ndarray:
    """The same for one step size, sample by sample."""
    w = np.zeros((x.shape[1], d.shape[1]))
    errors = np.empty_like(d)
    for t, (regressor, desired) in enumerate(zip(x, d, strict=True)):
        errors[t] = desired - regressor @ w
        w += mu / (EPS + regressor @ regressor) * np.outer(regressor, errors[t])
    return errors


def suppression(d, left, window: int = RATE // 8) -> np.ndarray:
    """Return by how many decibels the echo is weaker, (windows, M)."""
    power = [np.square(a).reshape(-1, window, *a.shape[1:]).mean((1, -1)) for a in (d, left)]
    return 10 * np.log10(power[0][:, None] / power[1])


def main(argv=None) -> int:
    parser = parser_of(__doc__, "echo_canceller.png")
    args = parser.parse_args(argv)
    found = surroundings(args.device, args.output)
    if found is None:
        return 2
    xp, drawn = found
    asarray, dtype = xp.asarray, np.float64 if xp is np else np.float32
    played, d = record()
    x = regressors(played, TAPS)
    left = cancel(x.astype(dtype), d.astype(dtype), asarray)
    exact = np.stack([textbook(x, d, mu) for mu in STEP_SIZES], axis=1)
    worst = np.max(np.abs(left - exact)) / np.max(np.abs(d))
    print(f"{len(d)} samples x {MICROPHONES} microphones x {len(STEP_SIZES)} step sizes")
    print(f"largest difference from the textbook's loop: {worst:.1e} of the loudest sample")
    if not worst < TOLERANCE[args.device]:
        print("the delta rule does not reproduce the NLMS filter", file=sys.stderr)
        return 1
    decibels = suppression(d, left)
    before, after = decibels[len(decibels) // 2 - 1], decibels[-1]
    print("echo suppressed before the door opens, and at the end:")
    for mu, first, second in zip(STEP_SIZES, before, after, strict=True):
        print(f"  mu = {mu:<4} {first:5.1f} dB {second:5.1f} dB")
    if drawn:
        draw(args.output, decibels)
    return 0


def draw(path: str, decibels) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    seconds = (np.arange(len(decibels)) + 0.5) * SECONDS / len(decibels)
    for j, mu in enumerate(STEP_SIZES):
        axes.plot(seconds, decibels[:, j], "o-", markersize=3, label=f"mu = {mu}")
    axes.axvline(SECONDS / 2, color="0.5", linestyle="--")
    axes.annotate("the door opens", (SECONDS / 2, 2), (6, 0), textcoords="offset points")
    axes.set(xlabel="seconds", ylabel="echo suppressed (dB)", xlim=(0, SECONDS), ylim=(0, None))
    axes.set_title("Two echoes cancelled by the delta rule as NLMS filter")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    sys.exit(main())
