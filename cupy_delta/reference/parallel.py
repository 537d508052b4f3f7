"""Threads over independent items, each calling single-threaded BLAS.

One level of threads, not two: while items run, the BLAS libraries are held to one thread, so
nothing is oversubscribed and every bit is the same for any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from threadpoolctl import ThreadpoolController

THREADS_VARIABLE = "CUPY_DELTA_NUM_THREADS"


def thread_count() -> int:
    """Threads to use: CUPY_DELTA_NUM_THREADS, by default the cores this process may run on."""
    text = os.environ.get(THREADS_VARIABLE)
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{THREADS_VARIABLE}: expected a positive integer, got {text!r}")
    return int(text)


def for_each(function: Callable, items: Iterable) -> None:
    """Call ``function(*item)`` for every item; the items must write to disjoint memory."""
    items = list(items)
    threads = min(thread_count(), len(items))
    with _single_threaded_blas():
        if threads <= 1:
            for item in items:
                _call(function, item)
            return
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_call, function, item) for item in items]:
                done.result()


def _call(function: Callable, item) -> None:
    # Inf and NaN in the inputs are legal and go where the arithmetic takes them.
    with np.errstate(all="ignore"):
        function(*item)


_lock = threading.Lock()
_users = 0
_controller: ThreadpoolController | None = None
_limiter = None


@contextmanager
def _single_threaded_blas():
    """Hold BLAS to one thread while anyone is inside; the last one out restores its setting."""
    global _users, _controller, _limiter
    with _lock:
        if _users == 0:
            _controller = _controller or ThreadpoolController()
            _limiter = _controller.limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limiter.restore_original_limits()
