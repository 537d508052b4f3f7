"""A communicator over MPI, by way of mpi4py."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..arrays import describe, module_of
from .communicators import check_timeout, neighbours, no_answer

TAG = 1
SHORTEST, LONGEST = 2e-6, 1e-3  # seconds between two looks at what is under way


class MPICommunicator:
    """A communicator over MPI.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Duplicated here, by all ranks together, so that what is sent meets nobody else's messages.
    timeout : float, default 300
        Seconds after which an exchange that is not complete is a `TimeoutError`. What MPI has under
        way cannot be taken back then: end the program (``comm.Abort()``).
    device_buffers : bool, default False
        Give MPI the memory of CuPy arrays as it is, which needs an MPI that is CUDA-aware.
        Otherwise they go through the host. Either way the host waits for the current stream.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI  # doctest: +SKIP
    >>> MPICommunicator(MPI.COMM_WORLD).all_gather(np.ones(3)).shape  # doctest: +SKIP
    (1, 3)
    """

    def __init__(self, comm: Any, timeout: float = 300.0, device_buffers: bool = False):
        check_timeout(timeout)
        if not hasattr(comm, "Dup"):
            raise TypeError(f"comm: expected a communicator of mpi4py, got {describe(type(comm))}")
        self._comm, self.timeout, self.device_buffers = comm.Dup(), timeout, device_buffers
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def all_gather(self, x):
        sent, received = self._buffers(x, (self.size, *x.shape))
        self._wait("all_gather", [self._comm.Iallgather(sent, received)])
        return self._like(x, received)

    def shift(self, x, by: int):
        target, source = neighbours(self, by)
        sent, received = self._buffers(x, x.shape)
        under_way = []
        if source is not None:
            under_way.append(self._comm.Irecv(received, source, TAG))
        if target is not None:
            under_way.append(self._comm.Isend(sent, target, TAG))
        self._wait("shift", under_way)
        return None if source is None else self._like(x, received)

    def _buffers(self, x, shape):
        xp = module_of(x)
        if xp is np:
            return x, np.empty(shape, x.dtype)
        if self.device_buffers:
            received = xp.empty(shape, x.dtype)
            xp.cuda.get_current_stream().synchronize()
            return x, received
        return xp.asnumpy(x), np.empty(shape, x.dtype)

    def _like(self, x, received):
        """Return what was received as an array of the kind of `x`."""
        xp = module_of(x)
        return received if isinstance(received, xp.ndarray) else xp.asarray(received)

    def _wait(self, what: str, under_way: list) -> None:
        """Wait for messages, and leave the processor to others that do the same."""
        start, pause = time.monotonic(), SHORTEST
        while not all(message.Test() for message in under_way):
            if time.monotonic() - start > self.timeout:
                raise no_answer(what, self.timeout)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST)
