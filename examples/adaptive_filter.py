"""The delta rule is the normalised LMS filter: predict the yearly sunspot numbers.

A filter of n taps predicts d_t from x_t, the n values before it, and then corrects its weights::

    y_t = w^T x_t,   w <- w + mu / (eps + x_t^T x_t) (d_t - y_t) x_t

With w as the state (K = n, V = 1), keys k_t = x_t, values v_t = d_t and
beta_t = mu / (eps + x_t^T x_t), that is one token of the delta rule; filters.py says how, and why
queries are those of the next token. Many step sizes mu run at once, as value heads that share the
keys.

The predictions are compared, sample by sample, with those of the NLMS filter of padasip.

Run ``python examples/adaptive_filter.py``; it needs statsmodels (for the data), padasip and, for
the picture, matplotlib: the extra ``examples``. With ``--device gpu`` the same call gets CuPy
arrays, in float32.
"""

from __future__ import annotations

import sys

import numpy as np
from filters import adapt, nlms_step
from surroundings import parser_of, save_figure, surroundings

from cupy_delta.extras import EXTRAS, install_command

STEP_SIZES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
EPS = 1e-3
TOLERANCE = {"cpu": 1e-9, "gpu": 1e-5}


def sunspots() -> tuple[np.ndarray, np.ndarray]:
    """Return the years 1700 to 2008 and their mean sunspot numbers."""
    from statsmodels.datasets import sunspots as data

    table = data.load_pandas().data
    return table["YEAR"].to_numpy(float), table["SUNACTIVITY"].to_numpy(float)


def lag_vectors(series: np.ndarray, taps: int) -> np.ndarray:
    """Return the `taps` values before each sample from number `taps` on, newest first."""
    return np.lib.stride_tricks.sliding_window_view(series[:-1], taps)[:, ::-1]


def predict(x: np.ndarray, d: np.ndarray, step_sizes, asarray=np.asarray):
    """Predict d_t from x_t with every step size at once.

    Parameters
    ----------
    x : array, (T, n)
        Lag vectors.
    d : array, (T,)
        What they should predict.
    step_sizes : sequence of float, length M
    asarray : callable
        Puts an array where the filter shall run: ``numpy.asarray`` or ``cupy.asarray``.

    Returns
    -------
    array, (T, M)
        Each prediction from the samples before it; the first is 0, from zero weights.
    """
    beta = nlms_step(x, step_sizes, EPS).astype(x.dtype)
    return adapt(x, d[:, None], beta, asarray=asarray)[0][:, :, 0]


def reference(x: np.ndarray, d: np.ndarray, mu: float) -> np.ndarray:
    """The same predictions from padasip's filter."""
    import padasip

    filter_ = padasip.filters.FilterNLMS(n=x.shape[1], mu=mu, eps=EPS, w="zeros")
    return filter_.run(d, x)[0]


def main(argv=None) -> int:
    parser = parser_of(__doc__, "adaptive_filter.png")
    parser.add_argument("--taps", type=int, default=9, help="lags per prediction")
    args = parser.parse_args(argv)
    try:
        years, series = sunspots()
        import padasip  # noqa: F401
    except ImportError as error:
        print(f"{error}: {install_command(*EXTRAS['examples'])}", file=sys.stderr)
        return 2
    if not 1 <= args.taps < len(series):
        print(f"--taps: expected 1 to {len(series) - 1}, got {args.taps}", file=sys.stderr)
        return 2
    found = surroundings(args.device, args.output)
    if found is None:
        return 2
    xp, drawn = found
    asarray, dtype = xp.asarray, np.float64 if xp is np else np.float32

    x, d = lag_vectors(series, args.taps), series[args.taps :]
    y = predict(x.astype(dtype), d.astype(dtype), STEP_SIZES, asarray)
    worst = max(np.max(np.abs(y[:, j] - reference(x, d, mu))) for j, mu in enumerate(STEP_SIZES))
    print(f"{len(d)} predictions x {len(STEP_SIZES)} step sizes")
    print(f"largest difference from padasip's NLMS: {worst:.1e} sunspots")
    if not worst < TOLERANCE[args.device] * np.max(np.abs(d)):
        print("the delta rule does not reproduce the NLMS filter", file=sys.stderr)
        return 1
    settled = slice(len(d) // 3, None)
    errors = np.sqrt(np.mean((y[settled] - d[settled, None]) ** 2, axis=0))
    naive = np.sqrt(np.mean((x[settled, 0] - d[settled]) ** 2))
    print("root mean square error over the last two thirds, by step size:")
    for mu, error in zip(STEP_SIZES, errors, strict=True):
        print(f"  mu = {mu:<5} {error:6.1f}")
    print(f"  last value {naive:5.1f}")
    if drawn:
        draw(args.output, years[args.taps :], d, y, errors)
    return 0


def draw(path: str, years, d, y, errors) -> None:
    import matplotlib.pyplot as plt

    best = int(np.argmin(errors))
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 6), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    top.plot(years, d, color="0.6", linewidth=3, label="measured")
    label = f"predicted one year ahead, mu = {STEP_SIZES[best]}"
    top.plot(years, y[:, best], color="tab:blue", linewidth=1.2, label=label)
    top.set(ylabel="sunspot number", title="Sunspots, predicted by the delta rule as NLMS filter")
    top.legend(loc="upper left")
    bottom.plot(years, d - y[:, best], color="tab:red", linewidth=1)
    bottom.axhline(0, color="0.6", linewidth=1)
    bottom.set(xlabel="year", ylabel="error", xlim=(years[0], years[-1]))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    sys.exit(main())
