"""The adapter of NCCL on a stand-in of CuPy: memory by address, copies between threads."""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from stand_in import Event, NcclError

from cupy_delta import parallel


class Comm:
    """CuPy's NcclCommunicator between threads."""

    def __init__(self, rank, size, barrier, addresses):
        self.rank, self.n, self.barrier, self.addresses = rank, size, barrier, addresses
        self.aborted, self.lost = False, False

    def rank_id(self):
        return self.rank

    def size(self):
        return self.n

    def allGather(self, sent, received, count, dtype, stream):
        self.addresses[self.rank] = sent
        self.barrier.wait(10)
        for rank in range(self.n):
            ctypes.memmove(received + rank * count, self.addresses[rank], count)
        self.barrier.wait(10)

    def send(self, sent, count, dtype, peer, stream):
        self.addresses[self.rank, peer] = ctypes.string_at(sent, count)

    def recv(self, received, count, dtype, peer, stream):
        while (peer, self.rank) not in self.addresses:
            pass
        text = self.addresses.pop((peer, self.rank))
        assert len(text) == count
        ctypes.memmove(received, text, count)

    def check_async_error(self):
        if self.lost:
            raise NcclError("remote process exited")

    def abort(self):
        self.aborted = True


def on_ranks(size, function):
    barrier, addresses = threading.Barrier(size), {}
    call = lambda c: function(  # noqa: E731
        parallel.NCCLCommunicator(Comm(c.rank, size, barrier, addresses), timeout=10)
    )
    return parallel.in_threads(size, call, 20)


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_all_gather(cupy, kind, dtype):
    def call(communicator):
        x = np.full((2, 3), communicator.rank, dtype)
        x = x if kind == "host" else cupy.asarray(x)
        found = communicator.all_gather(x)
        assert type(found) is type(x)
        return found[:, 1, 2].tolist(), found.shape, found.dtype

    assert on_ranks(3, call) == [([0, 1, 2], (3, 2, 3), dtype)] * 3


@pytest.mark.parametrize(
    ("by", "wanted"),
    [(1, [None, 0, 1]), (-1, [1, 2, None]), (2, [None, None, 0]), (-4, [None] * 3)],
)
def test_shift(cupy, by, wanted):
    def call(communicator):
        found = communicator.shift(cupy.asarray(np.full(5, communicator.rank, np.float32)), by)
        return None if found is None else float(found[4])

    assert on_ranks(3, call) == wanted


def test_a_device_that_waits_for_ever_is_aborted_in_time(cupy, monkeypatch):
    monkeypatch.setattr(Event, "done", False)
    comm = Comm(0, 1, threading.Barrier(1), {})
    communicator = parallel.NCCLCommunicator(comm, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"^all_gather: no answer from another rank within 0.05"):
        communicator.all_gather(np.zeros(3))
    assert comm.aborted


def test_the_host_goes_on_while_devices_exchange_and_waits_before_a_call_returns(cupy, monkeypatch):
    monkeypatch.setattr(Event, "done", False)
    comm = Comm(0, 1, threading.Barrier(1), {})
    communicator = parallel.NCCLCommunicator(comm, timeout=0.05)
    x = cupy.asarray(np.zeros(3))
    communicator.all_gather(x)
    communicator.shift(x, 0)
    assert not comm.aborted
    with pytest.raises(TimeoutError, match=r"^all_gather: no answer"):
        communicator.finish()
    assert comm.aborted


def test_calls_finish_what_they_started():
    class Starting:
        def __init__(self, inner):
            self.inner, self.rank, self.size = inner, inner.rank, inner.size
            self.all_gather, self.shift, self.finished = inner.all_gather, inner.shift, 0

        def finish(self):
            self.finished += 1

    def call(communicator):
        starting, seen = Starting(communicator), []
        x, beta = np.ones((1, 2, 1, 1)), np.ones((1, 2, 1))
        parallel.chunk_delta_rule(starting, x, x, x, beta)
        seen.append(starting.finished)
        o, _, residuals = parallel.chunk_delta_rule_fwd(starting, x, x, x, beta)
        seen.append(starting.finished)
        parallel.chunk_delta_rule_bwd(residuals, o)
        return [*seen, starting.finished]

    assert parallel.in_threads(2, call) == [[1, 2, 3]] * 2


def test_a_rank_that_nccl_has_lost_is_an_error(cupy, monkeypatch):
    monkeypatch.setattr(Event, "done", False)
    comm = Comm(0, 1, threading.Barrier(1), {})
    comm.lost = True
    with pytest.raises(RuntimeError, match="NCCL lost another rank: remote process exited"):
        parallel.NCCLCommunicator(comm).all_gather(np.zeros(3))
    assert comm.aborted


def test_without_a_timeout_the_host_does_not_wait(cupy, monkeypatch):
    monkeypatch.setattr(Event, "done", False)
    # As cupyx.distributed has it: a backend that holds a communicator.
    backend = SimpleNamespace(_comm=Comm(0, 1, threading.Barrier(1), {}))
    x = cupy.asarray(np.arange(3.0))
    communicator = parallel.NCCLCommunicator(backend, timeout=None)
    found = communicator.all_gather(x)
    communicator.finish()
    np.testing.assert_array_equal(found[0], x)
