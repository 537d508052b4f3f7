"""The CUDA backend on machines without a GPU: the device is the only thing that is swapped."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "emulator"))

from emulator import EmulatorDevice, Run

from cupy_delta import dispatch
from cupy_delta.cuda import operators


@pytest.fixture
def emulated(monkeypatch):
    """Send NumPy arrays to the CUDA backend on an emulated device.

    Returns a function that sets how launches are run; every device made since is in its `devices`.
    """

    def use(run=None, **facts):
        def device_of(x):
            use.devices.append(EmulatorDevice(run or Run(), **facts))
            return use.devices[-1]

        monkeypatch.setattr(operators, "device_of", device_of)

    use.devices = []
    monkeypatch.setitem(dispatch.BACKENDS, "numpy", "cupy_delta.cuda")
    use()
    return use


@pytest.fixture
def on_reference(monkeypatch):
    """Return a function that calls another on the NumPy backend."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setitem(dispatch.BACKENDS, "numpy", "cupy_delta.reference")
            return function(*args, **kwargs)

    return call
