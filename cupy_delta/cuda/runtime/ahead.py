"""Kernels compiled into CuPy's cache for an architecture that this machine need not have.

CuPy computes the key of its cache from the source, the options, NVRTC's version and the
architecture, and asks the current device for the last alone. So this goes CuPy's own way from
source to file, with the architecture given and the compiled kernel not loaded: a process on such a
GPU, with the same CuPy, NVRTC and folders, finds what was compiled here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from cupy._core import core
from cupy.cuda import compiler, function

from ..spec import DeviceFacts, Launch
from .environment import cache_folder, cache_in_memory, explain
from .programs import Program, compile_side_by_side, empty_programs

READABLE = 0o444  # by everybody


class NotLoaded(function.Module):
    """A module that leaves what it is given, since there is no device to load it on."""

    def __init__(self):
        """Make no context, which the class itself does."""

    def load(self, cubin):
        pass


class NotedCache:
    """CuPy's cache, and the names of what was found there or put there."""

    def __init__(self, cache):
        self._cache = cache
        self.names: set[str] = set()

    def load(self, name: str) -> bytes | None:
        self.names.add(name)
        return self._cache.load(name)

    def save(self, name: str, cubin: bytes, source: str) -> None:
        self._cache.save(name, cubin, source)


_lock = threading.Lock()


@contextmanager
def _without_device() -> Iterator[NotedCache]:
    """Have CuPy compile without asking a device what it is, and load nothing."""
    patched = "_get_arch_for_options_for_nvrtc", "function", "_kernel_cache_backend"
    with _lock:
        kept = {name: getattr(compiler, name) for name in patched}
        cache = NotedCache(compiler._kernel_cache_backend)
        try:
            # The function itself: what CuPy keeps of its results, it keeps by device.
            compiler._get_arch_for_options_for_nvrtc = kept[patched[0]].__wrapped__
            compiler.function = SimpleNamespace(Module=NotLoaded)
            compiler._kernel_cache_backend = cache
            yield cache
        finally:
            for name, value in kept.items():
                setattr(compiler, name, value)


class Architecture:
    """In place of a device: compiles kernels, and does nothing else with them."""

    def __init__(self, facts: DeviceFacts):
        self.facts = facts
        self.arch = "".join(map(str, facts.capability))
        newest = compiler._get_max_compute_capability()
        if int(self.arch) > int(newest):
            version = ".".join(map(str, compiler._get_nvrtc_version()))
            raise NotImplementedError(
                f"sm_{self.arch}: NVRTC {version} compiles for sm_{newest} at most, and CuPy knows"
                " no newer one; a newer cuda-toolkit may"
            )
        if cache_in_memory():
            raise ValueError("CUPY_CACHE_IN_MEMORY is set: nothing that is compiled would be kept")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        explain(error)

    def prepare(self, launches: tuple[Launch, ...]) -> None:
        """Compile all kernels of some launches, or find them in the cache."""
        programs = list(dict.fromkeys(Program.of(launch) for launch in launches))
        with _without_device() as cache:
            # A first call compiles these before several kernels, however many were compiled here.
            for program in empty_programs(programs):
                self._compile(program)
            compile_side_by_side(programs, self._compile)
        # CuPy's files are for their owner alone, and an image may run as somebody else.
        for name in cache.names:
            path = os.path.join(cache_folder(), name)
            if os.stat(path).st_mode & READABLE != READABLE:
                os.chmod(path, 0o644)

    def _compile(self, program: Program) -> None:
        """Do what `cupy.RawModule(code=..., options=...).compile()` does on a device."""
        core.compile_with_cache(
            program.source, program.options, arch=self.arch, prepend_cupy_headers=False
        )
