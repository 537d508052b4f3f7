"""Threads over independent items, each calling single-threaded BLAS.

One level of threads, not two: while items run, the BLAS libraries are held to one thread, so
nothing is oversubscribed and every bit is the same for any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from contextvars import Context
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

from ..forking import whole_at_fork
from ..threads import side_by_side

# Multiplications of a call below which starting threads takes as long as they save.
PRODUCTS_FOR_THREADS = 1 << 23
THREADS_VARIABLE = "CUPY_DELTA_NUM_THREADS"


def thread_count() -> int:
    """Threads to use: CUPY_DELTA_NUM_THREADS, by default the cores this process may run on."""
    text = os.environ.get(THREADS_VARIABLE)
    if text is None:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{THREADS_VARIABLE}: expected a positive integer, got {text!r}")
    return int(text)


def for_each(function: Callable, items: Iterable, products: float = np.inf) -> None:
    """Call ``function(*item)`` for every item; the items must write to disjoint memory.

    `products` counts the multiplications in all of them, outside of the interpreter's lock: few are
    done without threads.
    """
    items = list(items)
    useful = 1 if products < PRODUCTS_FOR_THREADS else len(items)
    threads = min(thread_count(), useful)
    with _single_threaded_blas():
        if threads <= 1:
            for item in items:
                call_quietly(function, item)
            return
        side_by_side(lambda item: call_quietly(function, item), items, threads, _hold_to_one_thread)


# NumPy keeps what it warns of in a context; to enter a copy takes no time, `np.errstate` does.
_quiet = Context()
_quiet.run(np.seterr, all="ignore")


def call_quietly(function: Callable, item: tuple) -> None:
    """Call without warnings: Inf and NaN in inputs are legal and go where arithmetic takes them."""
    _quiet.copy().run(function, *item)


# Calls that hold BLAS to one thread, by the thread that made them, and what to restore after them.
_inside: dict[int, int] = {}
_limits: list[tuple] = []


@contextmanager
def _single_threaded_blas():
    """Hold BLAS to one thread while anyone is inside; the last one out restores its setting."""
    me = threading.get_ident()
    with whole_at_fork:
        if not _inside:
            _limits[:] = [(library, library.get_num_threads()) for library in _blas_libraries()]
        _inside[me] = _inside.get(me, 0) + 1
        _hold_to_one_thread()
    try:
        yield
    finally:
        with whole_at_fork:
            _inside[me] -= 1
            if not _inside[me]:
                del _inside[me]
            if not _inside:
                _restore()


@cache
def _blas_libraries() -> list:
    controller = ThreadpoolController()
    return [x for x in controller.lib_controllers if x.user_api == "blas"]


def _hold_to_one_thread() -> None:
    """Also called by every thread that is started: where BLAS runs on OpenMP it counts for each."""
    for library in _blas_libraries():
        if library.get_num_threads() != 1:
            _set(library, 1)


def _restore() -> None:
    for library, threads in _limits:
        if threads != 1:
            _set(library, threads)


def _set(library, threads: int) -> None:
    # New versions of threadpoolctl let nobody but the thread that has set a library last set it
    # again while that thread lives. Here the last one out does, which may be any.
    clear = getattr(library, "clear_controlling_thread", None)
    if clear:
        clear(force=True)
    library.set_num_threads(threads)
    if clear:
        clear(force=True)


def _forget_other_threads() -> None:
    """In a forked child, end the calls of threads that it has not got."""
    me, forked_inside = threading.get_ident(), bool(_inside)
    for thread in [x for x in _inside if x != me]:
        del _inside[thread]
    if forked_inside and not _inside:
        _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
