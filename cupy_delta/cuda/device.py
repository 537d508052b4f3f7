"""A CUDA device as the backend sees it: memory, kernels, launches, on the current stream."""

from __future__ import annotations

import threading
from functools import cache, lru_cache

import cupy
import numpy as np

from . import workspace
from .environment import LOWEST_CAPABILITY
from .kernels import DeviceFacts, Launch
from .sources import kernel_folder, variant_source
from .tensor_maps import tensor_map

NULL = np.uint64(0)


class CupyDevice:
    """Memory and launches on the device where a problem's arrays live.

    Work goes to CuPy's current stream of that device; nothing here synchronises.
    """

    def __init__(self, index: int):
        self.index = index
        self._device = cupy.cuda.Device(index)
        self._targets: list = []
        self._beside = None

    def __enter__(self):
        self._device.__enter__()
        return self

    def __exit__(self, *error):
        self._device.__exit__(*error)

    @property
    def facts(self) -> DeviceFacts:
        return _facts(self.index)

    def empty(self, shape, dtype, name: str):
        kept = workspace.current()
        if kept is None:
            return cupy.empty(shape, dtype)
        return kept.take(self.index, name, shape, dtype, cupy.empty)

    def zeros(self, shape, dtype, name: str):
        x = self.empty(shape, dtype, name)
        x.fill(0)
        return x

    def bring(self, x, name: str, dtype):
        """Return `x` on the device, C-contiguous, aligned to 16 bytes, in `dtype` if given."""
        dtype = x.dtype if dtype is None else dtype
        if not isinstance(x, cupy.ndarray):
            if cupy.cuda.get_current_stream().is_capturing():
                raise ValueError(
                    f"{name}: expected a CuPy array while a CUDA graph is captured,"
                    f" got a NumPy array of shape {x.shape}"
                )
            return cupy.asarray(np.ascontiguousarray(x, dtype))
        if x.dtype == dtype and x.flags.c_contiguous and x.data.ptr % 16 == 0:
            return x
        y = self.empty(x.shape, dtype, f"{name} as read")
        cupy.copyto(y, x)
        return y

    def target(self, x, name: str):
        """Return an array that kernels may write in place of `x`; `finish` copies it back."""
        if x.data.ptr % 16 == 0:
            return x
        aligned = x.copy()
        self._targets.append((x, aligned))
        return aligned

    def finish(self) -> None:
        for x, aligned in self._targets:
            x[...] = aligned
        self._targets.clear()

    def tensor_map(self, x, shape: tuple, box: tuple):
        """Return the TMA map of a C-contiguous array as a kernel argument."""
        return tensor_map(x.data.ptr, shape, box)

    def compile(self, launch: Launch) -> None:
        """Compile a launch's kernel, or find it in CuPy's cache."""
        _compiled(self.index, launch)

    def launch(self, launch: Launch, values: list) -> None:
        kernel = _compiled(self.index, launch)
        arguments = tuple(NULL if v is None else v for v in values)
        size = (launch.grid,), (launch.block,)
        if launch.beside:
            # On a stream of its own, which the current one waits for after the next launch.
            side = _side_stream(self.index)
            side.wait_event(cupy.cuda.get_current_stream().record())
            with side:
                kernel(*size, arguments, shared_mem=launch.shared)
            self._beside = side.record()
            return
        kernel(*size, arguments, shared_mem=launch.shared)
        if self._beside is not None:
            cupy.cuda.get_current_stream().wait_event(self._beside)
            self._beside = None


@cache
def _facts(index: int) -> DeviceFacts:
    capability = cupy.cuda.Device(index).compute_capability
    if int(capability) < 10 * LOWEST_CAPABILITY:
        raise NotImplementedError(
            f"device {index} has compute capability {capability[:-1]}.{capability[-1]};"
            f" CuPy arrays need {LOWEST_CAPABILITY}.0 or newer, NumPy arrays no GPU"
        )
    attributes = cupy.cuda.Device(index).attributes
    return DeviceFacts(
        sm_count=attributes["MultiProcessorCount"],
        shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
        capability=(int(capability[:-1]), int(capability[-1])),
    )


_streams = threading.local()


def _side_stream(index: int):
    """Return this thread's second stream of a device, with that device current."""
    streams = _streams.__dict__
    if index not in streams:
        streams[index] = cupy.cuda.Stream(non_blocking=True)
    return streams[index]


@lru_cache(1024)
def _compiled(index: int, launch: Launch):
    """Look a launch's kernel up by the launch itself, which is quicker than by its macros."""
    return _kernel(index, launch.file, launch.entry, launch.defines, launch.shared, launch.arch)


@cache
def _kernel(index: int, file: str, entry: str, defines: tuple, shared: int, arch: str):
    """Compile one variant for one device, once; runs with that device current."""
    options = ("--std=c++17", f"-I{kernel_folder()}")
    if arch:
        options += (f"-arch={arch}",)
    module = cupy.RawModule(code=variant_source(file, defines), options=options)
    kernel = module.get_function(entry)
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel
