"""A CUDA device as the backend sees it: memory, kernels, launches, on the current stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from typing import Any, NamedTuple

import cupy
import numpy as np

from ... import workspace
from ..spec import INTEGERS, DeviceFacts, Launch
from .environment import LOWEST_CAPABILITY, explain
from .programs import Program, compile_side_by_side
from .tensor_maps import tensor_map

# Of most arguments CuPy makes the address of a value at every launch; one of this class is one. It
# takes arrays with one element as well, should the class ever be gone.
by_value = getattr(cupy.cuda.function, "CNumpyArray", np.asarray)
NULL = by_value(np.zeros(1, np.uint64))
current_device, current_stream = cupy.cuda.runtime.getDevice, cupy.cuda.get_current_stream


class CupyDevice:
    """Memory and launches on the device where a problem's arrays live.

    Work goes to CuPy's current stream of that device, or to a second one that the current one waits
    for before the call returns; nothing here makes the host wait.
    """

    def __init__(self, index: int):
        self.index = index
        self._device = cupy.cuda.Device(index)

    def __enter__(self):
        self._device.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self._device.__exit__(kind, error, trace)
        explain(error)

    @cached_property
    def facts(self) -> DeviceFacts:
        capability = self._device.compute_capability
        if int(capability) < 10 * LOWEST_CAPABILITY:
            raise NotImplementedError(
                f"device {self.index} has compute capability {capability[:-1]}.{capability[-1]};"
                f" CuPy arrays need {LOWEST_CAPABILITY}.0 or newer, NumPy arrays no GPU"
            )
        attributes = self._device.attributes
        return DeviceFacts(
            sm_count=attributes["MultiProcessorCount"],
            shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
            capability=(int(capability[:-1]), int(capability[-1])),
        )

    def empty(self, shape, dtype, name: str):
        kept = workspace.current()
        if kept is None:
            return cupy.ndarray(shape, dtype)
        return kept.take(self.index, name, shape, dtype, cupy.ndarray)

    def zeros(self, shape, dtype, name: str):
        x = self.empty(shape, dtype, name)
        x.fill(0)
        return x

    def bring(self, x, name: str, dtype):
        """Return `x` on the device, C-contiguous, in `dtype` if given, aligned as it is read.

        To 16 bytes, but integers, which are read one at a time, as they lie: a row of indices need
        not begin at 16 bytes, and to copy it would take as long as a small step.
        """
        dtype = x.dtype if dtype is None else dtype
        if not isinstance(x, cupy.ndarray):
            if cupy.cuda.get_current_stream().is_capturing():
                raise ValueError(
                    f"{name}: expected a CuPy array while a CUDA graph is captured,"
                    f" got a NumPy array of shape {x.shape}"
                )
            return cupy.asarray(np.ascontiguousarray(x, dtype))
        aligned = name in INTEGERS or x.data.ptr % 16 == 0
        if aligned and x.dtype == dtype and x.flags.c_contiguous:
            return x
        y = self.empty(x.shape, dtype, f"{name} as read")
        cupy.copyto(y, x)
        return y

    def apart(self, x, name: str):
        """Return a copy of `x`, whose memory is about to be written before all of it is read."""
        y = self.empty(x.shape, x.dtype, f"{name} as given")
        cupy.copyto(y, x)
        return y

    def target(self, x, name: str):
        """Return an array that kernels may write in place of `x`, to be copied back to it.

        A pool is written where it lies: its plan goes by its alignment.
        """
        return x if name == "state" or x.data.ptr % 16 == 0 else x.copy()

    def prepare(self, launches: tuple[Launch, ...]) -> None:
        """Compile all kernels of some launches, or find them in CuPy's cache."""
        _prepared(self.index, launches)

    def load(self, launches: tuple[Launch, ...]) -> None:
        """Compile kernels and load them, so that launching them does nothing else."""
        self.prepare(launches)
        for launch in launches:
            _loaded(self.index, launch)

    def borrow(self, address: int, nbytes: int) -> Borrowed:
        """Return memory of this device that is someone else's, for `launch`."""
        memory = cupy.cuda.UnownedMemory(address, nbytes, None, self.index)
        return Borrowed(cupy.cuda.MemoryPointer(memory, 0))

    def stream(self, address: int):
        """Return a context in which someone else's stream of this device is the current one."""
        return cupy.cuda.Stream.from_external(ForeignStream(address))

    def repeated(self, launch: Launch, arrays: dict) -> Callable[[], None]:
        """Return a launch on the same memory, of which it holds the addresses alone.

        It may be called with any device as the current one.
        """
        return Again(self, launch, arrays).start

    def launch(self, launch: Launch, arrays: dict) -> None:
        """Launch a kernel; a pointer to no array is null."""
        loaded = _loaded(self.index, launch)
        arguments = loaded.arguments.copy()
        for i, name in launch.pointers:
            x = arrays[name]
            if x is not None:
                arguments[i] = x.data
        for i, box in launch.boxes:
            arguments[i] = _map(arrays[box.name].data.ptr, box.shape, box.box)
        call = loaded.grid, loaded.block, arguments, launch.shared
        if launch.concurrent:
            # On a stream of its own, which the current one waits for after the next launch.
            side = _side_stream(self.index)
            side.wait_event(cupy.cuda.get_current_stream().record())
            loaded.kernel(*call, side)
            _beside.ends[self.index] = side.record()
            return
        loaded.kernel(*call)
        end = _beside.ends.pop(self.index, None)
        if end is not None:
            cupy.cuda.get_current_stream().wait_event(end)


class Again:
    """A launch on the same memory, with its arguments as CUDA takes them.

    CuPy would put them together anew every time.
    """

    def __init__(self, device: CupyDevice, launch: Launch, arrays: dict):
        self.device, self.index = device, device.index
        self.loaded, self.shared = _loaded(device.index, launch), launch.shared
        # Memory of every argument, and the address of each.
        self.arguments = [
            a.reshape(1) if isinstance(a, np.generic) else np.zeros(1, np.uint64)
            for a in launch.arguments
        ]
        for i, name in launch.pointers:
            if arrays[name] is not None:
                self.arguments[i][0] = arrays[name].data.ptr
        self.addresses = np.array([x.ctypes.data for x in self.arguments], np.uintp)
        self.at = self.addresses.ctypes.data
        sizes = *self.loaded.grid, 1, 1, *self.loaded.block, 1, 1, self.shared
        self.launch_kernel = partial(cupy.cuda.driver.launchKernel, self.loaded.kernel.ptr, *sizes)

    def start(self) -> None:
        """Launch it on the current stream of its device."""
        index = self.index
        if current_device() != index:  # quicker than to make it current
            with self.device:
                return self._start_by_cupy()
        try:
            self.launch_kernel(current_stream(index).ptr, self.at, 0)
        except cupy.cuda.driver.CUDADriverError:  # of a thread that has not used CUDA, for example
            self._start_by_cupy()

    def _start_by_cupy(self) -> None:
        arguments = [by_value(x) for x in self.arguments]
        self.loaded.kernel(self.loaded.grid, self.loaded.block, arguments, self.shared)


class Borrowed(NamedTuple):
    """Of an array what `CupyDevice.launch` asks of it."""

    data: cupy.cuda.MemoryPointer


class ForeignStream(NamedTuple):
    """A stream as CuPy takes it from others."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


class _Beside(threading.local):
    """This thread's second stream of each device, and the end of what runs on it."""

    def __init__(self):
        self.streams: dict = {}
        self.ends: dict = {}


_beside = _Beside()


def _side_stream(index: int):
    """Return this thread's second stream of a device, with that device current."""
    if index not in _beside.streams:
        _beside.streams[index] = cupy.cuda.Stream(non_blocking=True)
    return _beside.streams[index]


class Loaded(NamedTuple):
    """A launch on one device: the kernel, and arguments as CuPy passes them with the least ado."""

    kernel: Any
    grid: tuple[int]
    block: tuple[int]
    arguments: list


@lru_cache(1024)
def _loaded(index: int, launch: Launch) -> Loaded:
    """Look a launch's kernel up by the launch itself, which is quicker than by its macros."""
    kernel = _kernel(index, launch.entry, Program.of(launch), launch.shared)
    arguments = [
        by_value(a.reshape(1)) if isinstance(a, np.generic) else NULL for a in launch.arguments
    ]
    return Loaded(kernel, (launch.grid,), (launch.block,), arguments)


@lru_cache(4096)
def _map(address: int, shape: tuple, box: tuple):
    """Keep maps by all that they depend on: memory that is used again has the same one."""
    return by_value(tensor_map(address, shape, box))


@cache
def _kernel(index: int, entry: str, program: Program, shared: int):
    """Return a kernel of a program, allowed the shared memory that it takes."""
    kernel = _module(program).get_function(entry)
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    _ = kernel.num_regs  # to ask loads the kernel, which CUDA else may do at its first launch
    return kernel.kernel


_compiled: set[tuple[int, Program]] = set()


@lru_cache(1024)
def _prepared(index: int, launches: tuple[Launch, ...]) -> None:
    """Compile what was not compiled yet; runs with that device current."""
    programs = dict.fromkeys(Program.of(launch) for launch in launches)
    new = [program for program in programs if (index, program) not in _compiled]
    compile_side_by_side(new, partial(_compile, index))
    _compiled.update((index, program) for program in new)


def _compile(index: int, program: Program) -> None:
    """Compile, maybe in a thread of its own, with this device current until it ends.

    As a context the device would leave the thread with device 0, where CUDA then makes a context.
    """
    cupy.cuda.Device(index).use()
    _module(program).compile()


def _module(program: Program) -> cupy.RawModule:
    """Return it as CuPy has it, which compiles equal ones once per device."""
    return cupy.RawModule(code=program.source, options=program.options)
