"""Ranks that are threads: what they give away is theirs again, and whose error is whose."""

import re
import time

import numpy as np
import pytest

from cupy_delta import parallel
from cupy_delta.arrays import describe


@pytest.mark.parametrize("what", ["all_gather", "shift"])
def test_an_array_may_change_once_the_call_has_returned(what):
    def call(communicator):
        right = True
        for turn in range(30):
            x = np.full(1_000_000, float(turn))
            found = communicator.all_gather(x) if what == "all_gather" else communicator.shift(x, 1)
            x[:] = -1
            right = right and (found is None or bool((found == turn).all()))
        return right

    assert parallel.in_threads(3, call, 30) == [True] * 3


def test_a_timeout_of_a_ranks_own_is_its_failure_and_nobody_waits_for_it():
    def call(communicator):
        if communicator.rank == 1:
            raise TimeoutError("the database")
        communicator.all_gather(np.ones(1))

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^the database$"):
        parallel.in_threads(3, call, timeout=5)
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize("other", [np.ones(2), np.ones(1, np.float32)])
@pytest.mark.parametrize("what", ["all_gather", "shift"])
def test_arrays_that_differ_do_not_meet(what, other):
    def call(communicator):
        x = other if communicator.rank == 1 else np.ones(1)
        by = [1] if what == "shift" else []
        with pytest.raises(ValueError) as caught:
            getattr(communicator, what)(x, *by)
        return str(caught.value)

    wanted = f"{what}: expected one shape and dtype on every rank, got ((1,), 'float64') on rank 0"
    for text in parallel.in_threads(3, call, 20):
        assert text == f"{wanted} and {other.shape, str(other.dtype)} on rank 1"


@pytest.mark.parametrize("kind", ["threads", parallel.MPICommunicator, parallel.NCCLCommunicator])
@pytest.mark.parametrize("by", [1.0, "1", None, np.ones(2)])
def test_a_shift_is_by_an_integer(kind, by):
    """Found before anything is sent: nobody waits for the rank that made the mistake."""
    wanted = rf"^by: expected an integer, got {re.escape(repr(by))}$"

    def call(communicator):
        with pytest.raises(TypeError, match=wanted):
            communicator.shift(np.ones(1), by)
        return True

    if kind == "threads":
        assert parallel.in_threads(2, call) == [True, True]
        return
    communicator = object.__new__(kind)
    communicator.rank, communicator.size = 0, 2
    assert call(communicator)


@pytest.mark.parametrize(
    ("by", "found"), [(np.int64(1), [None, 0]), (-1, [1, None]), (10**30, None)]
)
def test_a_shift_by_any_integer(by, found):
    def call(communicator):
        x = communicator.shift(np.array([communicator.rank]), by)
        return None if x is None else int(x[0])

    assert parallel.in_threads(2, call) == (found or [None, None])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, print), ValueError, "size: expected at least 1, got 0"),
        ((-1, print), ValueError, "size: expected at least 1, got -1"),
        (("2", print), TypeError, "size: expected an integer, got '2'"),
        ((2, None), TypeError, "function: expected a callable, got None"),
        ((1, print, float("nan")), ValueError, "timeout: expected at least 0 seconds, got nan"),
        ((1, print, -1), ValueError, "timeout: expected at least 0 seconds, got -1"),
        ((1, print, "1"), TypeError, "timeout: expected a number of seconds, got '1'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error) as caught:
        parallel.in_threads(*arguments)
    assert caught.type is error
    assert str(caught.value) == text


def test_an_endless_timeout_is_one():
    assert parallel.in_threads(2, lambda c: c.all_gather(np.ones(1)).size, float("inf")) == [2] * 2


@pytest.mark.parametrize("kind", [parallel.MPICommunicator, parallel.NCCLCommunicator])
def test_other_communicators_name_a_wrong_timeout_before_they_touch_anything(kind):
    with pytest.raises(ValueError, match=r"^timeout: expected at least 0 seconds, got nan$"):
        kind(object(), timeout=float("nan"))


@pytest.mark.parametrize("comm", [None, 5, np.ones(2)])
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (parallel.MPICommunicator, "a communicator of mpi4py"),
        (parallel.NCCLCommunicator, "an NcclCommunicator or NCCLBackend of CuPy"),
    ],
)
def test_other_communicators_name_what_they_are_made_of(kind, wanted, comm):
    with pytest.raises(TypeError, match=rf"^comm: expected {wanted}, got {describe(type(comm))}$"):
        kind(comm)
