"""A stand-in for CuPy and its arrays, so that what looks at them needs no GPU."""

import itertools
import sys
import types

import numpy as np

from cupy_delta import building_blocks, operators
from cupy_delta.cuda.spec import DeviceFacts

ADDRESSES = itertools.count(1 << 40, 1 << 20)


class FakeDevice:
    def __init__(self, number):
        self.id = number

    def __eq__(self, other):
        return self.id == other.id


class FakeArray:
    """As much of cupy.ndarray as the checks may look at; its values cannot be read."""

    def __init__(self, like, device=0):
        self.shape, self.ndim, self.dtype = like.shape, like.ndim, like.dtype
        self.flags, self.strides, self.size = like.flags, like.strides, like.size
        # An address that no other array of a test has.
        self.device, self.address = FakeDevice(device), next(ADDRESSES)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.address, device_id=self.device.id)


FakeArray.__module__, FakeArray.__qualname__, FakeArray.__name__ = "cupy", "ndarray", "ndarray"


def stand_in_for_cupy(monkeypatch):
    """Return a stand-in for CuPy, with the problems that reach its backend."""
    module = types.ModuleType("cupy")
    module.ndarray = FakeArray
    module.may_share_memory = lambda x, y: x is y
    module.problems = []
    monkeypatch.setitem(sys.modules, "cupy", module)

    class Backend:
        def __getattr__(self, name):
            pairs = "chunk_delta_rule", "recurrent_delta_rule", "sequence_transfer"
            results = 2 if name in pairs else 3
            return lambda problem: module.problems.append(problem) or (None,) * results

    for caller in (operators, building_blocks):
        real = caller.backend_for
        fake = lambda kind, real=real: Backend() if kind == "cupy" else real(kind)  # noqa: E731
        monkeypatch.setattr(caller, "backend_for", fake)
    return module


def on_device(arguments, device=0):
    return {
        n: FakeArray(x, device) if isinstance(x, np.ndarray) else x for n, x in arguments.items()
    }


class Launcher:
    """A device that notes what is asked of it; arrays are as kernels read them, unless copied."""

    facts = DeviceFacts(sm_count=132, shared_bytes=227 * 1024)

    def __init__(self, copied=()):
        self.copied, self.asked = copied, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def bring(self, x, name, dtype):
        return FakeArray(x) if name in self.copied else x

    def empty(self, shape, dtype, name):
        return FakeArray(np.empty(shape, dtype))

    def target(self, x, name):
        return x

    def prepare(self, launches):
        self.asked.append("prepared")

    def launch(self, launch, arrays):
        self.asked.append("launched")

    def repeated(self, launch, arrays):
        return lambda: self.asked.append([arrays[name] for name in ("q", "state", "o")])
