"""Filters as the delta rule: every row of the table in examples/filters.py against a plain loop."""

import re
import sys

import echo_canceller
import filters
import numpy as np
import pytest


def loop(x, d, beta, leakage=0.0, w=None):
    """One filter in the order of the table: leak, predict, correct."""
    w = np.zeros((x.shape[1], d.shape[1])) if w is None else w
    predicted = np.empty_like(d)
    for t in range(len(x)):
        w = (1 - leakage) * w
        predicted[t] = x[t] @ w
        w = w + beta[t] * np.outer(x[t], d[t] - predicted[t])
    return predicted, w


@pytest.fixture
def signals():
    rng = np.random.default_rng(0)
    x = filters.regressors(rng.standard_normal(300), 7)
    return x, x @ rng.standard_normal((7, 2)) + 0.1 * rng.standard_normal((300, 2))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("leakage", [0.0, 0.03])
def test_each_filter_in_blocks_of_any_length(signals, normalised, leakage):
    x, d = signals
    mu = np.array([0.02, 0.05])
    beta = filters.nlms_step(x, mu, 1e-3) if normalised else np.tile(mu, (len(x), 1))
    g = np.full(beta.shape, np.log(1 - leakage)) if leakage else None
    predicted, weights = [], None
    for start, stop in [(0, 1), (1, 100), (100, 300)]:
        block = slice(start, stop)
        given = (x[block], d[block], beta[block], None if g is None else g[block])
        y, weights = filters.adapt(*given, weights=weights)
        predicted.append(y)
    for j in range(len(mu)):
        exact, w = loop(x, d, beta[:, j], leakage)
        assert np.allclose(np.concatenate(predicted)[:, j], exact, rtol=0, atol=1e-12)
        assert np.allclose(weights[0, j], w, rtol=0, atol=1e-12)


def test_regressors_hold_nothing_but_the_past():
    x = filters.regressors(np.arange(1.0, 6.0), 3)
    assert x.tolist()[:3] == [[1, 0, 0], [2, 1, 0], [3, 2, 1]] and len(x) == 5


def test_the_echo_is_cancelled_as_by_the_textbook(capsys, tmp_path):
    path = tmp_path / "echo.png"
    assert echo_canceller.main(["-o", str(path)]) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"textbook's loop: (\S+)", text)[1]) < 1e-9
    assert all(float(x) > 20 for x in re.findall(r"([\d.]+) dB", text))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_echo_canceller_that_is_wrong_is_noticed(capsys, monkeypatch, tmp_path):
    right = filters.chunk_delta_rule

    def a_posteriori(q, k, *args, **kwargs):
        return right(k, k, *args, **kwargs)

    monkeypatch.setattr(filters, "chunk_delta_rule", a_posteriori)
    assert echo_canceller.main(["-o", str(tmp_path / "echo.png")]) == 1
    assert "does not reproduce" in capsys.readouterr().err


def test_without_matplotlib_the_command_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert echo_canceller.main(["-o", str(tmp_path / "echo.png")]) == 0
    assert "no picture: " in capsys.readouterr().out and not list(tmp_path.iterdir())
