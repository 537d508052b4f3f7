"""Arrays decide where a call runs: the backend for a kind of array."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from .typing import Backend

BACKENDS = {"numpy": "cupy_delta.reference", "cupy": "cupy_delta.cuda"}


def backend_for(kind: str) -> Backend:
    """Return the backend module; it is imported on first use, so NumPy users never load CuPy."""
    return _module(BACKENDS[kind])


_module = cache(import_module)
