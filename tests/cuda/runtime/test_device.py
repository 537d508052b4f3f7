"""How a device compiles, with a CuPy that compiles nothing; no GPU needed."""

import ctypes
import sys
import threading
import weakref
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

import cupy_delta.cuda
from cupy_delta import Workspace
from cupy_delta.cuda import variants
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.spec import DeviceFacts, Launch, Plan

pytestmark = pytest.mark.fast

SECONDS = 10


class Module:
    """A RawModule: `compile` meets as many others as `meeting` waits for."""

    made: ClassVar[dict] = {}
    meeting: ClassVar[threading.Barrier] = threading.Barrier(1)
    refused: ClassVar[dict] = {}  # the error, and what it waits for
    refusals: ClassVar[dict] = {}  # what is set by one
    loaded: ClassVar[list] = []

    def __init__(self, code, options):
        self.key = device_in_use.index, code, options

    def compile(self):
        _, code, _ = self.key
        if self.key in Module.made:
            return
        if "#include" in code:
            Module.meeting.wait(SECONDS)
            if code in Module.refused:
                error, after = Module.refused[code]
                assert after is None or after.wait(SECONDS)
                if code in Module.refusals:
                    Module.refusals[code].set()
                raise error
        Module.made[self.key] = threading.get_ident()

    def get_function(self, entry):
        assert self.key in Module.made, "looked up before it was compiled"
        Module.loaded.append((entry, threading.get_ident()))
        return SimpleNamespace(
            kernel=lambda *call: None, max_dynamic_shared_size_bytes=None, num_regs=0
        )


class InUse(threading.local):
    index = 0


device_in_use = InUse()


class Device:
    """Of CuPy: a context that restores the device before it, or used until the thread ends."""

    set_in_threads: ClassVar[list] = []

    def __init__(self, index):
        self.index = index

    def use(self):
        device_in_use.index = self.index
        if threading.current_thread() is not threading.main_thread():
            Device.set_in_threads.append(self.index)

    def __enter__(self):
        self.before = Device(device_in_use.index)
        self.use()

    def __exit__(self, *error):
        self.before.use()


class DriverError(RuntimeError):
    """What CuPy raises where CUDA's driver refuses."""


@pytest.fixture
def on_device(monkeypatch):
    """Return the module of the device, imported with a CuPy of which it needs no more than this."""
    for name, value in (("made", {}), ("refused", {}), ("refusals", {}), ("loaded", [])):
        monkeypatch.setattr(Module, name, value)
    monkeypatch.setattr(Device, "set_in_threads", [])
    monkeypatch.setattr(Module, "meeting", threading.Barrier(1))
    runtime = SimpleNamespace(getDevice=lambda: device_in_use.index)
    streams = SimpleNamespace(ptr=7000), SimpleNamespace(ptr=7001)
    cuda = SimpleNamespace(
        function=None,
        Device=Device,
        runtime=runtime,
        driver=SimpleNamespace(launchKernel=None, CUDADriverError=DriverError),
        get_current_stream=lambda index: streams[index],
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=Module))
    # Setting it first has it as it was afterwards.
    monkeypatch.setattr(cupy_delta.cuda.runtime, "device", None, raising=False)
    monkeypatch.delitem(sys.modules, "cupy_delta.cuda.runtime.device", raising=False)
    yield import_module("cupy_delta.cuda.runtime.device")
    sys.modules.pop("cupy_delta.cuda.runtime.device")


def launch(entry, grid=1, **defines):
    return Launch("tokens/l2norm.cu", entry, tuple(defines.items()), grid, 32, 0, ())


def compiled():
    """Which threads compiled kernels, by macros."""
    return {code: ident for (_, code, _), ident in Module.made.items() if "#include" in code}


def test_kernels_of_a_plan_are_compiled_side_by_side(on_device, monkeypatch):
    launches = tuple(launch("l2norm", HEAD_K=k) for k in (8, 16, 24))
    monkeypatch.setattr(Module, "meeting", threading.Barrier(3))  # breaks unless all three wait
    before = threading.active_count()
    with Device(1):
        on_device.CupyDevice(1).prepare(launches)
    # Not even for a moment the one that a new thread would have.
    assert set(Device.set_in_threads) == {1}
    assert threading.active_count() == before
    assert len(compiled()) == 3 and {index for index, _, _ in Module.made} == {1}
    assert len(set(compiled().values())) == 3


def test_an_empty_program_is_compiled_first_once_per_options(on_device):
    first, second = launch("l2norm", HEAD_K=8), launch("l2norm", HEAD_K=16)
    on_device.CupyDevice(0).prepare((first, second))
    kinds = ["#include" in code for _, code, _ in Module.made]
    assert kinds == [False, True, True]


def test_one_kernel_needs_no_thread_and_equal_ones_count_once(on_device):
    device = on_device.CupyDevice(0)
    device.prepare((launch("l2norm", HEAD_K=8), launch("l2norm", HEAD_K=8)))
    assert list(Module.made.values()) == [threading.get_ident()]
    device.prepare((launch("l2norm", HEAD_K=8), launch("l2norm", HEAD_K=16)))
    assert list(compiled().values()) == 2 * [threading.get_ident()]


def test_what_is_compiled_is_not_asked_for_again(on_device, monkeypatch):
    launches = launch("l2norm", HEAD_K=8), launch("l2norm", HEAD_K=16)
    device = on_device.CupyDevice(0)
    device.prepare(launches)
    monkeypatch.setattr(Module, "compile", None)
    device.prepare(launches)
    device.prepare(launches[::-1])
    device.prepare(())


def test_each_device_compiles(on_device):
    launches = launch("l2norm", HEAD_K=8), launch("l2norm", HEAD_K=16)
    for index in (0, 1):
        with Device(index):
            on_device.CupyDevice(index).prepare(launches)
    assert {index for index, _, _ in Module.made} == {0, 1} and len(Module.made) == 6


def test_the_first_error_is_raised_and_the_rest_is_compiled(on_device):
    launches = tuple(launch("l2norm", HEAD_K=k) for k in (8, 16, 24))
    _, second, third = (on_device.Program.of(x).source for x in launches)
    Module.refusals[third] = threading.Event()
    Module.refused[second] = RuntimeError("second"), Module.refusals[third]
    Module.refused[third] = RuntimeError("third"), None
    device, before = on_device.CupyDevice(0), threading.active_count()
    with pytest.raises(RuntimeError, match="second"):
        device.prepare(launches)
    assert threading.active_count() == before and len(compiled()) == 1
    with pytest.raises(RuntimeError, match="second"):
        device.prepare(launches)
    Module.refused.clear()
    device.prepare(launches)
    assert len(compiled()) == 3


def test_a_full_disk_is_one_line_that_says_what_helps(on_device, monkeypatch, tmp_path):
    some = launch("l2norm", HEAD_K=8)
    Module.refused[on_device.Program.of(some).source] = OSError(28, "No space left"), None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    device = on_device.CupyDevice(0)
    with pytest.raises(OSError, match=r"kernel cache .* cannot be .* set CUPY_CACHE_DIR"), device:
        device.prepare((some,))
    assert device_in_use.index == 0


def test_kernels_are_looked_up_by_the_thread_that_launches(on_device):
    launches = launch("one", HEAD_K=8), launch("two", HEAD_K=16)
    device = on_device.CupyDevice(0)
    device.prepare(launches)
    assert Module.loaded == []
    for x in launches:
        on_device._loaded(0, x)
    assert Module.loaded == [(x.entry, threading.get_ident()) for x in launches]


class Recorder:
    """A device that keeps what it is asked to do."""

    facts = DeviceFacts(sm_count=132, shared_bytes=227 * 1024)

    def __init__(self):
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def empty(self, shape, dtype, name):
        return np.empty(shape, dtype)

    def prepare(self, launches):
        self.asked.append(launches)

    def launch(self, launch, arrays):
        self.asked.append(launch)


def test_a_plan_is_prepared_before_its_first_launch_without_what_has_no_work():
    idle, *working = launches = [launch("l2norm", grid=grid) for grid in (0, 1, 2)]
    device = Recorder()
    execute(Plan(tuple(launches), {}), {}, device)
    assert device.asked == [tuple(working), *working] and idle not in device.asked


def test_kernels_compiled_ahead_are_prepared_several_at_a_time():
    launches = [launch("l2norm", HEAD_K=k) for k in range(variants.AT_ONCE + 2)]
    device = Recorder()
    ready = variants.compile_variants(device, launches)
    assert next(ready) is launches[0] and len(device.asked) == 1
    assert [launches[0], *ready] == launches
    assert [x for some in device.asked for x in some] == launches and len(device.asked) == 2


@pytest.fixture
def repeat(on_device, monkeypatch):
    """Return what repeats a launch on a device; its `launched` and `by_cupy` say what it asks for.

    `by_cupy`: of CuPy's own launch, with the device that is the current one then.
    """

    def of(index, one, arrays):
        by_cupy = lambda *call: of.by_cupy.append((device_in_use.index, call))  # noqa: E731
        kernel = type("Kernel", (), {"ptr": 99, "__call__": lambda self, *call: by_cupy(*call)})()
        loaded = on_device.Loaded(kernel, (5,), (32,), [])
        monkeypatch.setattr(on_device, "_loaded", lambda *which: loaded)
        return on_device.CupyDevice(index).repeated(one, arrays)

    of.launched, of.by_cupy = [], []
    driver = sys.modules["cupy"].cuda.driver
    driver.launchKernel = lambda *call: of.launched.append(call)
    return of


def test_a_repeated_launch_holds_addresses_and_no_array(repeat):
    x = Array((2, 3), np.float32)
    one = replace(launch("l2norm"), arguments=("x", np.int32(3), "y", np.float64(0.5)), shared=48)
    again, gone = repeat(0, one, dict(x=x, y=None)), weakref.ref(x)
    del x
    assert gone() is None
    others = [
        np.full(n, -1, np.intp) for n in range(5) for _ in range(100)
    ]  # in memory that is free
    again()
    ((*sizes, at, extra),) = repeat.launched
    assert sizes == [99, 5, 1, 1, 32, 1, 1, 48, 7000] and extra == 0
    values = (ctypes.c_void_p * 4).from_address(at)
    types = ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_double
    read = [t.from_address(value).value for t, value in zip(types, values, strict=True)]
    assert read == [1 << 40, 3, 0, 0.5] and others


@pytest.mark.parametrize("current", [0, 1])
def test_a_repeated_launch_is_on_its_device_whichever_is_current(repeat, monkeypatch, current):
    again = repeat(1, replace(launch("l2norm"), arguments=(np.int32(3),)), {})
    monkeypatch.setattr(device_in_use, "index", current)
    again()
    assert device_in_use.index == current
    if current == 1:
        ((*_, stream, _, _),) = repeat.launched
        assert stream == 7001 and not repeat.by_cupy
    else:
        ((index, (grid, block, arguments, shared)),) = repeat.by_cupy
        assert (index, grid, block, shared) == (1, (5,), (32,), 0) and not repeat.launched
        assert [x.tolist() for x in arguments] == [[3]]


def test_a_repeated_launch_that_the_driver_refuses_is_left_to_cupy(repeat):
    """Such as one of a thread that has not used CUDA, for which CuPy makes a context first."""

    def refuse(*call):
        raise DriverError("invalid device context")

    sys.modules["cupy"].cuda.driver.launchKernel = refuse
    again = repeat(0, replace(launch("l2norm"), arguments=()), {})
    again()
    assert len(repeat.by_cupy) == 1


class Array:
    """Of CuPy: an array, whose views have its memory."""

    def __init__(self, shape, dtype, memory=None, offset=0):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.flags = SimpleNamespace(c_contiguous=True)
        self.data = SimpleNamespace(ptr=(1 << 40) + offset, mem=memory or object())

    def view(self):
        return Array(self.shape, self.dtype, self.data.mem)


def test_what_a_call_in_a_workspace_writes_it_does_not_read(on_device, monkeypatch):
    cupy, copies = sys.modules["cupy"], []
    monkeypatch.setattr(cupy, "ndarray", Array, raising=False)
    monkeypatch.setattr(cupy, "copyto", lambda *pair: copies.append(pair), raising=False)
    monkeypatch.setattr(on_device.CupyDevice, "launch", lambda *which: None)
    device, like = on_device.CupyDevice(0), ((2, 3), np.dtype(np.float32))
    one = replace(launch("l2norm"), arguments=("initial_state", "v", "final_state"))
    plan = Plan((one,), {"final_state": like})

    def called(initial, v):
        return execute(plan, {"initial_state": initial, "v": v}, device)

    with Workspace():
        other = device.empty(*like, "w")
        final = called(Array(*like), other)["final_state"]
        for x in (final, final.view()):
            arrays = called(x, other)
            assert arrays["final_state"] is final and arrays["v"] is other
            assert arrays["initial_state"].data.mem is not final.data.mem
            assert copies.pop() == (arrays["initial_state"], x) and not copies
        again = called(arrays["initial_state"], other)
        assert again["initial_state"] is arrays["initial_state"]
        with Workspace():
            assert called(final, other)["initial_state"] is final
    assert called(final, other)["initial_state"] is final and not copies


@pytest.mark.parametrize(
    ("name", "dtype", "offset", "copied"),
    [
        ("state_indices", np.int64, 8, False),
        ("output_state_indices", np.int64, 8, False),
        ("accepted", np.int64, 24, False),
        ("cu_seqlens", np.int64, 8, False),
        ("state_indices", np.int32, 0, True),
        ("beta", np.float32, 4, True),
        ("q", np.float32, 16, False),
    ],
)
def test_what_lies_as_kernels_read_it_is_not_copied(
    on_device, monkeypatch, name, dtype, offset, copied
):
    cupy, copies = sys.modules["cupy"], []
    monkeypatch.setattr(cupy, "ndarray", Array, raising=False)
    monkeypatch.setattr(cupy, "copyto", lambda *pair: copies.append(pair), raising=False)
    x = Array((3,), dtype, offset=offset)
    wanted = np.dtype(np.int64 if np.dtype(dtype).kind == "i" else dtype)
    y = on_device.CupyDevice(0).bring(x, name, wanted)
    assert copies == ([(y, x)] if copied else []) and (y is x) != copied
