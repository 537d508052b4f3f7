"""Arrays decide where a call runs: the backend for a kind of array."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from .forking import whole_at_fork
from .typing import Backend

BACKENDS = {"numpy": "cupy_delta.reference", "cupy": "cupy_delta.cuda"}


def backend_for(kind: str) -> Backend:
    """Return the backend module; it is imported on first use, so NumPy users never load CuPy."""
    return _module(BACKENDS[kind])


@cache
def _module(name: str) -> Backend:
    # A child forked in the middle of an import could never import the module itself.
    with whole_at_fork:
        return import_module(name)
