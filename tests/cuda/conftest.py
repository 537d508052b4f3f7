"""The CUDA backend on machines without a GPU: the device is the only thing that is swapped."""

from dataclasses import fields, replace
from importlib import import_module

import numpy as np
import pytest
from emulator import EmulatorDevice, Run, span_of
from threadpoolctl import threadpool_limits

import cupy_delta.building_blocks as blocks_module
import cupy_delta.operators as operators_module
from cupy_delta import dispatch, reference
from cupy_delta.cuda import operators
from cupy_delta.problem import Problem
from cupy_delta.results import Residuals


def pytest_generate_tests(metafunc):
    """Emulated tests run on both legs, the source and what NVRTC makes of it, or on LEGS."""
    check_ptx_leg(metafunc.definition)
    if "emulated" in metafunc.fixturenames and "both_legs" not in metafunc.fixturenames:
        legs = getattr(metafunc.module, "LEGS", ["source", "ptx"])
        legs = ["gpu"] if metafunc.config.getoption("--on-gpu") else legs
        metafunc.parametrize("emulated", legs, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Leave out cases that are not for a leg of NVRTC's, by the marker `ptx_leg`.

    With --on-gpu, leave out what is about the emulator, the compiler or a stand-in alone.
    """
    left_out = [x for x in items if not has_its_leg(x)]
    if config.getoption("--on-gpu"):
        emulator_only = {"test_device.py", "test_legs.py", "test_resources.py"}
        left_out = [x for x in items if x.path.name in emulator_only or "leg" in x.fixturenames]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [x for x in items if x not in left_out]


def check_ptx_leg(test):
    """Check that a test has every case that its marker `ptx_leg` leaves to that leg."""
    marker, known = test.get_closest_marker("ptx_leg"), {}
    for given in test.iter_markers("parametrize") if marker else ():
        names, cases = given.args[:2]
        names = [x.strip() for x in names.split(",")] if isinstance(names, str) else names
        for case in cases:
            for name, value in zip(names, case if len(names) > 1 else [case], strict=True):
                known.setdefault(name, []).append(value)
    for name, values in marker.kwargs.items() if marker else ():
        missing = [x for x in values if x not in known.get(name, [])]
        if missing or not values:
            raise pytest.UsageError(f"{test.nodeid}: no case of {name} = {missing}")


def has_its_leg(item):
    """Tell whether a case runs on its leg: sizes and values that legs have in common need one."""
    marker = item.get_closest_marker("ptx_leg")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    legs = parameters.get("emulated"), parameters.get("leg")
    if marker is None or not {"ptx", "fused"}.intersection(legs):
        return True
    return all(parameters[name] in values for name, values in marker.kwargs.items())


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_blas():
    """What tests compare with are small products; threads that wait for more take whole cores."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture
def emulated(monkeypatch, request):
    """Send NumPy arrays to the CUDA backend on an emulated device.

    Returns a function that sets how launches are run; every device made since is in its `devices`.
    With --on-gpu the arrays go to a real GPU and back, and how launches are run is up to it.
    """
    chosen = getattr(request, "param", "source")
    if chosen == "gpu":
        monkeypatch.setattr(dispatch, "backend_for", lambda kind: GpuRoundTrip(kind))
        monkeypatch.setattr(operators_module, "backend_for", lambda kind: GpuRoundTrip(kind))
        monkeypatch.setattr(blocks_module, "backend_for", lambda kind: GpuRoundTrip(kind))

        def on_gpu(*args, **kwargs):
            """How a launch is run, and on what, is up to the GPU; nothing is recorded."""

        on_gpu.devices = None
        return on_gpu

    def use(run=None, leg=chosen, **facts):
        def device_of(x):
            use.devices.append(EmulatorDevice(run or Run(), leg=leg, **facts))
            return use.devices[-1]

        monkeypatch.setattr(operators, "device_of", device_of)

    use.devices = []
    monkeypatch.setitem(dispatch.BACKENDS, "numpy", "cupy_delta.cuda")
    use()
    return use


@pytest.fixture
def both_legs(emulated):
    """Return a function that makes a call on either leg and returns both results."""

    def call(function, **facts):
        results = []
        for leg in ("source", "ptx"):
            emulated(leg=leg, **facts)
            results.append(function())
        return results

    return call


class GpuRoundTrip:
    """The CUDA backend for NumPy arrays: arrays go to the GPU, results come back."""

    def __init__(self, kind):
        self._backend = import_module(dispatch.BACKENDS["cupy"])

    def __getattr__(self, name):
        import cupy

        function = getattr(self._backend, name)

        def to_gpu(x):
            if isinstance(x, np.ndarray):
                return cupy.asarray(x)
            if isinstance(x, Problem):
                moved = {f.name: to_gpu(getattr(x, f.name)) for f in fields(x) if f.init}
                if x.state is not None:  # with what lies between its slots
                    memory, like = cupy.asarray(span_of(x.state)), x.state
                    moved["state"] = cupy.lib.stride_tricks.as_strided(
                        memory, like.shape, like.strides
                    )
                return replace(x, **moved)
            if isinstance(x, Residuals):
                return replace(x, problem=to_gpu(x.problem))
            return x

        def to_host(x):
            if isinstance(x, cupy.ndarray):
                return x.get()
            if hasattr(x, "_make"):
                return x._make(map(to_host, x))
            return tuple(map(to_host, x)) if isinstance(x, tuple) else x

        def call(*args):
            moved = [to_gpu(a) for a in args]
            result = to_host(function(*moved))
            for given, there in zip(args, moved, strict=True):
                if isinstance(given, Problem):
                    if given.state is not None:
                        span_of(given.state)[...] = span_of(there.state, cupy).get()
                        if isinstance(result, tuple):
                            result = (result[0], given.state, *result[2:])
                    if given.out is not None:
                        given.out[...] = there.out.get()
                        result = (
                            (given.out, *result[1:]) if isinstance(result, tuple) else given.out
                        )
            return result

        return call


@pytest.fixture
def on_reference(monkeypatch):
    """Return a function that calls another on the NumPy backend."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setitem(dispatch.BACKENDS, "numpy", "cupy_delta.reference")
            for module in (dispatch, operators_module, blocks_module):
                patch.setattr(module, "backend_for", lambda kind: reference)
            return function(*args, **kwargs)

    return call
