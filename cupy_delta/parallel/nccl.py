"""A communicator over NCCL, by way of CuPy: one process, or thread, for each GPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..arrays import describe, module_of
from .communicators import check_timeout, neighbours, no_answer

PAUSE = 2e-5  # seconds between two looks at what is under way


class NCCLCommunicator:
    """A communicator over NCCL.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator or cupyx.distributed.NCCLBackend
        Made by all ranks together, with this rank's device current.
    timeout : float or None, default 300
        Seconds after which an exchange that is not complete aborts the communicator and is a
        `TimeoutError`. For that the host waits, before a call returns, for the call's exchanges,
        though not for what the device does after them. With None it waits for none of those of
        CuPy arrays, calls can be captured in a CUDA graph, and a rank that is gone makes the
        others' streams hang.

    Notes
    -----
    Exchanges are on the current stream.
    """

    def __init__(self, comm: Any, timeout: float | None = 300.0):
        if timeout is not None:
            check_timeout(timeout)
        # What CuPy's backend adds to the communicator that it holds is not needed here.
        self._comm: Any = comm if hasattr(comm, "allGather") else getattr(comm, "_comm", None)
        if self._comm is None:
            raise TypeError(
                "comm: expected an NcclCommunicator or NCCLBackend of CuPy,"
                f" got {describe(type(comm))}"
            )
        self.timeout = timeout
        self.rank, self.size = self._comm.rank_id(), self._comm.size()
        self._under_way: list[tuple[str, Any, float]] = []

    def all_gather(self, x):
        on_device = self._on_device(x)
        received = module_of(on_device).empty((self.size, *x.shape), x.dtype)
        if x.size:
            self._comm.allGather(
                on_device.data.ptr, received.data.ptr, x.nbytes, self._bytes(), self._stream()
            )
        return self._received("all_gather", x, received)

    def shift(self, x, by: int):
        target, source = neighbours(self, by)
        on_device = self._on_device(x)
        received = module_of(on_device).empty(x.shape, x.dtype)
        if x.size and (target, source) != (None, None):
            from cupy.cuda import nccl

            nccl.groupStart()
            if target is not None:
                self._comm.send(on_device.data.ptr, x.nbytes, self._bytes(), target, self._stream())
            if source is not None:
                self._comm.recv(received.data.ptr, x.nbytes, self._bytes(), source, self._stream())
            nccl.groupEnd()
        received = self._received("shift", x, received)
        return None if source is None else received

    @staticmethod
    def _on_device(x):
        import cupy

        return cupy.ascontiguousarray(cupy.asarray(x))

    @staticmethod
    def _bytes() -> int:
        """Everything travels as bytes, so that there is no dtype that NCCL does not know."""
        from cupy.cuda import nccl

        return nccl.NCCL_UINT8

    @staticmethod
    def _stream() -> int:
        import cupy

        return cupy.cuda.get_current_stream().ptr

    def finish(self) -> None:
        """Wait, if a time is set, for the exchanges that were started."""
        under_way, self._under_way = self._under_way, []
        for what, event, timeout in under_way:
            self._wait(what, event, timeout)

    def _received(self, what: str, x, received):
        """Return what was received as an array of the kind of `x`, which the host has at once."""
        if self.timeout is not None:
            import cupy

            event = cupy.cuda.Event(disable_timing=True)
            event.record()
            self._under_way.append((what, event, self.timeout))
        if module_of(x) is not np:
            return received
        self.finish()
        return module_of(received).asnumpy(received)

    def _wait(self, what: str, event, timeout: float) -> None:
        from cupy.cuda import nccl

        start = time.monotonic()
        while not event.done:
            try:
                self._comm.check_async_error()
            except nccl.NcclError as error:
                self._comm.abort()
                raise RuntimeError(f"{what}: NCCL lost another rank: {error}") from error
            if time.monotonic() - start > timeout:
                # The kernel that waits on the device ends with that, and the stream goes on.
                self._comm.abort()
                raise no_answer(what, timeout)
            time.sleep(PAUSE)
