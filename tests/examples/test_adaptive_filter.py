"""The example runs and says what it should."""

import re
import sys

import adaptive_filter
import filters
import numpy as np
import pytest


@pytest.mark.slow
def test_filter_reproduces_an_independent_nlms_and_beats_the_last_value(capsys, tmp_path):
    path = tmp_path / "filter.png"
    assert adaptive_filter.main(["-o", str(path)]) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"padasip's NLMS: (\S+)", text)[1]) < 1e-9
    errors = [float(x) for x in re.findall(r"mu = \S+ +(\S+)", text)]
    assert len(errors) == len(adaptive_filter.STEP_SIZES)
    assert min(errors) < float(re.search(r"last value +(\S+)", text)[1])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_prediction_is_noticed(capsys, monkeypatch, tmp_path):
    right = filters.chunk_delta_rule

    def wrong(*args, **kwargs):
        o, state = right(*args, **kwargs)
        o[0, 100, 2, 0] += 1e-5
        return o, state

    monkeypatch.setattr(filters, "chunk_delta_rule", wrong)
    assert adaptive_filter.main(["-o", str(tmp_path / "filter.png")]) == 1
    assert "does not reproduce" in capsys.readouterr().err


def test_predictions_use_only_the_past():
    rng = np.random.default_rng(0)
    series = rng.standard_normal(80)
    x, d = adaptive_filter.lag_vectors(series, 3), series[3:]
    before = adaptive_filter.predict(x, d, (0.1, 0.5))
    series[60:] = 100.0
    x, d = adaptive_filter.lag_vectors(series, 3), series[3:]
    after = adaptive_filter.predict(x, d, (0.1, 0.5))
    assert np.array_equal(before[:58], after[:58])
    assert not np.array_equal(before[58:], after[58:])


@pytest.mark.parametrize("module", ["padasip", "statsmodels.datasets"])
def test_a_missing_package_is_named(capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert adaptive_filter.main([]) == 2
    error = capsys.readouterr().err
    assert module in error and "install 'matplotlib>=3.8' 'padasip>=1.2'" in error


@pytest.mark.parametrize("taps", ["0", "309"])
def test_impossible_taps_are_refused(capsys, taps):
    assert adaptive_filter.main(["--taps", taps]) == 2
    assert "expected 1 to 308" in capsys.readouterr().err
