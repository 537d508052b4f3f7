"""What the operators ask of a communicator, and one between the threads of a process."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

import numpy as np


class Communicator(Protocol):
    """How a rank talks to the others: any object with these two attributes and two methods.

    Every rank makes the same calls in the same order. Arrays are C-contiguous, and of one shape and
    dtype on all ranks: uint8, float32 or float64, of NumPy, and of CuPy where calls have such. CuPy
    arrays are read and written in the order of the current stream. What cannot be done in time is
    a `TimeoutError`. One that only starts exchanges may have a method ``finish()``, which raises
    that error: it is called before a call returns.
    """

    @property
    def rank(self) -> int:
        """This rank's number; ranks have the tokens in their order."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    def all_gather(self, x: Any, /) -> Any:
        """Return the arrays of all ranks, (size, \\*x.shape)."""
        ...

    def shift(self, x: Any, by: int, /) -> Any:
        """Send `x` to rank + by, and return what rank - by sent; None where there is no such."""
        ...


def finish(communicator: Communicator) -> None:
    """Have the exchanges of a call done, by a communicator that has only started them."""
    getattr(communicator, "finish", lambda: None)()


class RankFailedError(RuntimeError):
    """Another rank of the group has raised an error, which is the cause of this one."""


class _NoAnswer(TimeoutError):
    """The end of a wait for other ranks, which no error of a rank's own is taken for."""


def no_answer(what: str, timeout: float, missing: list[int] | None = None) -> TimeoutError:
    """Return the error for ranks that did not come."""
    who = "another rank" if missing is None else f"rank {', '.join(map(str, missing))}"
    return _NoAnswer(f"{what}: no answer from {who} within {timeout:g} s")


def neighbours(communicator: Communicator, by: Any) -> tuple[int | None, int | None]:
    """Return the ranks that a shift sends to and receives from, None where there is no such."""
    try:
        by = operator.index(by)
    except TypeError:
        raise TypeError(f"by: expected an integer, got {by!r}") from None
    rank, size = communicator.rank, communicator.size
    to, from_ = (n if 0 <= n < size else None for n in (rank + by, rank - by))
    return to, from_


def check_timeout(timeout: Any) -> None:
    """Check a number of seconds: one that compares with no time would never be over."""
    if not isinstance(timeout, Real):
        raise TypeError(f"timeout: expected a number of seconds, got {timeout!r}")
    if not float(timeout) >= 0:
        raise ValueError(f"timeout: expected at least 0 seconds, got {timeout}")


class _Meeting:
    """What the threads of a group share."""

    def __init__(self, size: int, timeout: float):
        self.timeout, self.barrier = timeout, threading.Barrier(size)
        self.brought: list[Any] = [None] * size
        self.times = [0] * size  # how often each rank came
        self.failed: dict[int, BaseException] = {}

    def exchange(self, rank: int, what: str, x: Any) -> list[Any]:
        """Bring a copy of `x`, which the rank may change at once; return what all have brought."""
        self.brought[rank] = x.copy()
        self.times[rank] += 1
        self._wait(what, self.times[rank])
        found = list(self.brought)
        self._wait(what, self.times[rank])
        return found

    def _wait(self, what: str, turn: int) -> None:
        try:
            self.barrier.wait(min(self.timeout, threading.TIMEOUT_MAX))
        except threading.BrokenBarrierError:
            if self.failed:
                rank, error = min(self.failed.items())
                text = f"{what}: rank {rank} failed: {type(error).__name__}: {error}"
                raise RankFailedError(text) from error
            missing = [r for r, times in enumerate(self.times) if times < turn]
            raise no_answer(what, self.timeout, missing or None) from None


class ThreadCommunicator:
    """One rank of a group of threads, as `in_threads` gives it to them."""

    def __init__(self, meeting: _Meeting, rank: int):
        self._meeting, self.rank = meeting, rank
        self.size = len(meeting.brought)

    def all_gather(self, x):
        return np.stack(self._exchange("all_gather", x))

    def shift(self, x, by: int):
        _, source = neighbours(self, by)
        every = self._exchange("shift", x)
        return None if source is None else every[source]

    def _exchange(self, what: str, x) -> list[Any]:
        every = self._meeting.exchange(self.rank, what, x)
        looks = [(y.shape, str(y.dtype)) for y in every]
        for rank, look in enumerate(looks):
            if look != looks[0]:
                raise ValueError(
                    f"{what}: expected one shape and dtype on every rank,"
                    f" got {looks[0]} on rank 0 and {look} on rank {rank}"
                )
        return every


def in_threads(
    size: int, function: Callable[[ThreadCommunicator], Any], timeout: float = 60.0
) -> list[Any]:
    """Call a function on every rank of a group of threads: for tests, and to try things out.

    Parameters
    ----------
    size : int
        Number of ranks.
    function : callable
        Given the rank's communicator. NumPy arrays only.
    timeout : float, default 60
        Seconds after which a rank that waits for another raises a `TimeoutError`.

    Returns
    -------
    list
        What the calls returned, by rank.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument, which is named.
    BaseException
        What a rank raised; if several did, the lowest of those that did not merely wait.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_delta.parallel import in_threads
    >>> in_threads(3, lambda c: c.all_gather(np.array([c.rank]))[:, 0].tolist())
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError(f"size: expected an integer, got {size!r}") from None
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if not callable(function):
        raise TypeError(f"function: expected a callable, got {function!r}")
    check_timeout(timeout)
    meeting = _Meeting(size, timeout)
    results: list[Any] = [None] * size
    waited: dict[int, BaseException] = {}

    def call(rank: int) -> None:
        try:
            results[rank] = function(ThreadCommunicator(meeting, rank))
        except (_NoAnswer, RankFailedError) as error:
            waited[rank] = error
        except BaseException as error:
            meeting.failed[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for errors in (meeting.failed, waited):
        if errors:
            raise errors[min(errors)]
    return results
