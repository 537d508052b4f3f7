"""What an example lacks is one line before its work, and no picture is lost."""

import os
import sys

import adaptive_filter
import echo_canceller
import pytest
import serving

EXAMPLES = [adaptive_filter, echo_canceller, serving]


@pytest.fixture
def no_work(monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("the work began")

    monkeypatch.setattr(adaptive_filter, "predict", work)
    monkeypatch.setattr(echo_canceller, "record", work)
    monkeypatch.setattr(serving, "stream", work)


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_gpu(capsys, monkeypatch, no_work, example):
    monkeypatch.setattr("surroundings.gpu_problem", lambda: "no driver")
    assert example.main(["--device", "gpu"]) == 2
    assert capsys.readouterr().err == "no GPU can be used: no driver\n"


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name, reason", [("-", "name of a file"), ("x.txt", "got .txt")])
def test_a_picture_that_cannot_be_written(
    capsys, monkeypatch, tmp_path, no_work, example, name, reason
):
    monkeypatch.chdir(tmp_path)
    assert example.main(["-o", name]) == 2
    assert reason in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_without_matplotlib_there_is_no_picture(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    for example, more in ((adaptive_filter, []), (serving, ["--requests", "2", "-o", "x.png"])):
        assert example.main(more) == 0
        assert "no picture: " in capsys.readouterr().out
    assert not os.listdir(tmp_path)
