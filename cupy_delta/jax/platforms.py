"""The platforms of XLA that calls can be lowered for, and the backend of each.

A backend is a module with

- ``NAME``, and ``contract()``: what programs rely on beyond the version of the library,
- ``check(function, call)``: a NotImplementedError for what it lacks,
- ``residuals(call)``: the buffers that the forward leaves to the backward,
- ``trace(bind, function, call, arrays, results)``: the results by name, from arrays by name, where
  ``bind(arrays, buffers)`` traces a custom call from arrays to buffers,
- ``prepare(work)``: all that must not happen when a program runs; XLA has it done as soon as it has
  a program, compiled or from disk,
- ``run(work, sources, targets, context)``: the work itself, on buffers at these addresses.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import jax

from ..call import Call
from ..extras import EXTRAS, install_command
from . import cuda, ffi, host

BACKENDS = {"cpu": host, "cuda": cuda}


@cache
def available() -> dict:
    """Return the backends of this process by platform; residuals are those of the last."""
    if not _has_cuda():
        return {"cpu": host}
    if importlib.util.find_spec("cupy") is None:
        if default_platform() == "cuda":
            raise ImportError(
                "cupy_delta.jax runs on a GPU by way of CuPy, which is not installed:"
                f" {install_command(*EXTRAS['cuda12'])} (or cuda13), or set JAX_PLATFORMS=cpu"
            )
        return {"cpu": host}
    return BACKENDS


def supporting(function: str, call: Call) -> dict:
    """Return the backends that have what a call needs, by platform.

    Whether it is lowered for a platform that lacks something is not known while it is traced. On
    the platform where JAX puts arrays by default it is taken to be: then the error is raised.
    """
    found = {}
    for platform, backend in available().items():
        try:
            backend.check(function, call)
            found[platform] = backend
        except NotImplementedError:
            if platform == default_platform():
                raise
    return found


def default_platform() -> str:
    """Return the platform where JAX puts arrays unless it is told otherwise."""
    chosen = jax.config.jax_default_device
    name = getattr(chosen, "platform", chosen) or jax.default_backend()
    return "cuda" if name == "gpu" else name


def register() -> None:
    """Make all backends known to XLA, for programs that were traced in another process."""
    for platform, backend in BACKENDS.items():
        ffi.target(platform, backend)


def _has_cuda() -> bool:
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:  # what JAX raises for a platform that this process does not have
        return False
