"""The times of single kernels, with a device that launches nothing and a clock that counts."""

import itertools
from types import SimpleNamespace

import pytest

import kernels


def clock():
    ticks = itertools.count()

    class Event:
        def record(self):
            self.at = next(ticks)

    return Event


def test_every_launch_is_recorded_and_the_device_is_put_back():
    class Device:
        launched = ()

        def launch(self, launch, arrays):
            self.launched += (launch.entry, *arrays)

    before, device = Device.launch, Device()
    with pytest.raises(ZeroDivisionError), kernels.every_launch(Device, clock()) as found:
        device.launch(SimpleNamespace(entry="factors"), {"q": 1})
        device.launch(SimpleNamespace(entry="walk"), {})
        raise ZeroDivisionError
    assert device.launched == ("factors", "q", "walk")
    assert [(name, a.at, b.at) for name, a, b in found] == [("factors", 0, 1), ("walk", 2, 3)]
    assert Device.launch is before


def test_medians_are_of_what_a_call_takes():
    calls = [[("walk", 1.0), ("walk", 2.0), ("join", 5.0)], [("walk", 10.0)], [("walk", 4.0)]]
    assert kernels.medians(calls) == {"walk": 4.0, "join": 0.0}


def test_what_cannot_run_is_said(capsys, monkeypatch):
    assert kernels.main(["--rows", "nowhere*"]) == 2
    assert "no row matches nowhere*" in capsys.readouterr().err
    monkeypatch.setattr("cupy_delta.commands.console.gpu_problem", lambda: "no driver")
    assert kernels.main([]) == 2
    assert "no GPU can be used: no driver" in capsys.readouterr().err
