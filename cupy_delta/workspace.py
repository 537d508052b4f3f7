"""Buffers that are kept between calls, so that a call allocates nothing: for CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


class _Local(threading.local):
    """What this thread has entered, the innermost last; None where a workspace is left aside."""

    def __init__(self):
        self.entered: list[Workspace | None] = []


_local = _Local()


class Workspace:
    """A context in which calls on CuPy arrays keep their buffers in this object.

    A CUDA graph keeps no reference to memory that was allocated while it was captured. Inside a
    workspace the first call of a shape allocates its buffers; later calls with the same shapes and
    options, captured ones included, use the same ones and neither allocate nor synchronise. Pass
    ``out=`` as well, since outputs are the caller's. Calls on NumPy arrays take no notice of it.

    Attributes
    ----------
    nbytes : int
        Bytes that are held, on all devices; they are freed with the object.

    Notes
    -----
    Everything that a call returns inside the context, ``out`` aside, lies in the workspace and is
    overwritten by the next call of the same shapes, which may be given it: it reads a copy. Calls
    must follow each other on one stream: they share their buffers. The context holds for the thread
    that entered it, and the innermost one counts. `Transfer.apply` and `Transfer.then` allocate
    their results nevertheless, and so do the functions of `cupy_delta.parallel` what they tell
    other ranks. While a graph is captured, every array has to be in device memory already,
    ``cu_seqlens`` and ``state_indices`` included, C-contiguous and aligned to 16 bytes, with beta
    and g, or the parameters of a raw gate, in the dtype of sums (float32, or float64 with float64
    inputs).

    Examples
    --------
    >>> import cupy_delta
    >>> workspace = cupy_delta.Workspace()
    >>> workspace.nbytes
    0

    With CuPy arrays, a call that is captured once and then replayed::

        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, workspace:
            cupy_delta.chunk_delta_rule(q, k, v, beta, out=o)  # compiles and allocates
            stream.begin_capture()
            cupy_delta.chunk_delta_rule(q, k, v, beta, out=o)
            graph = stream.end_capture()
        graph.launch(stream)
    """

    def __init__(self):
        self._buffers: dict = {}
        self._names: dict = {}  # by what CuPy has once per allocation

    def __enter__(self) -> Workspace:
        _local.entered.append(self)
        return self

    def __exit__(self, *error) -> None:
        _local.entered.pop()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(x.nbytes for x in self._buffers.values())

    def take(self, device: int, name: str, shape: tuple, dtype, allocate):
        """Return the backend's buffer of a name, shape and dtype, which `allocate` makes once."""
        key = (device, name, shape, dtype)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = allocate(shape, dtype)
            if not isinstance(buffer, np.ndarray):
                self._names[buffer.data.mem] = name
        return buffer

    def name_of(self, x) -> str | None:
        """Return the name of the buffer that an array lies in, whole or as a view."""
        return None if isinstance(x, np.ndarray) else self._names.get(x.data.mem)


def current() -> Workspace | None:
    """The workspace of this thread, if one is entered."""
    entered = _local.entered
    return entered[-1] if entered else None


@contextmanager
def left_aside() -> Iterator[None]:
    """Allocate afresh: for results that meet each other as inputs of the same call."""
    _local.entered.append(None)
    try:
        yield
    finally:
        _local.entered.pop()
