"""Buffers that are kept between calls, so that a call allocates nothing: for CUDA graphs."""

from __future__ import annotations

import threading

_local = threading.local()


class Workspace:
    """A context in which CuPy calls take their buffers from, and leave them to, this object.

    A CUDA graph keeps no reference to memory that was allocated while it was captured. Inside a
    workspace the first call of a shape allocates its buffers; later calls with the same shapes and
    options, captured ones included, use the same ones and neither allocate nor synchronise. Pass
    ``out=`` as well, since outputs are the caller's.

    Notes
    -----
    Everything that a call returns inside the context, ``out`` aside, lies in the workspace and is
    overwritten by the next call of the same shapes. Calls must follow each other on one stream:
    they share their buffers. The context holds for the thread that entered it.

    Examples
    --------
    ::

        workspace = cupy_delta.cuda.Workspace()
        with stream, workspace:
            cupy_delta.chunk_delta_rule(q, k, v, beta, out=o)  # compiles and allocates
            stream.begin_capture()
            cupy_delta.chunk_delta_rule(q, k, v, beta, out=o)
            graph = stream.end_capture()
        graph.launch(stream)
    """

    def __init__(self):
        self._buffers: dict = {}
        self._outer: list = []

    def __enter__(self) -> Workspace:
        self._outer.append(current())
        _local.workspace = self
        return self

    def __exit__(self, *error) -> None:
        _local.workspace = self._outer.pop()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(x.nbytes for x in self._buffers.values())

    def take(self, device: int, name: str, shape, dtype, allocate):
        """Return the buffer of this name, shape and dtype; `allocate` makes it the first time."""
        key = (device, name, tuple(shape), dtype)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = allocate(shape, dtype)
        return buffer


def current() -> Workspace | None:
    """The workspace of this thread, if one is entered."""
    return getattr(_local, "workspace", None)
