"""Items shared among threads, of which the calling one is one.

Not by a pool of `concurrent.futures`: once the main thread has come to its end such a pool takes
nothing, though other threads go on, and functions that run at exit are still to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from threading import Thread


def side_by_side(
    function: Callable, items: Iterable, threads: int, begin: Callable | None = None
) -> None:
    """Call ``function(item)`` for every item, in as many threads; all are gone when this returns.

    Every thread that is started calls `begin` first. Where none can be started, the calling one
    does all. After an error no item is begun any more; of several errors that of the first item is
    raised.
    """
    left = deque(enumerate(items))
    done = [False] * len(left)
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while left and not errors:
            try:
                i, item = left.popleft()
            except IndexError:  # another thread has the last one
                return
            try:
                function(item)
                done[i] = True
            except BaseException as error:
                errors[i] = error

    def begin_and_work() -> None:
        if begin is not None:
            begin()
        work()

    started: list[Thread] = []
    try:
        for _ in range(min(threads, len(left)) - 1):
            thread = Thread(target=begin_and_work)
            try:
                thread.start()
            except RuntimeError:  # there are too many, or the interpreter takes itself down
                break
            started.append(thread)
        work()
    finally:
        left.clear()
        for thread in started:
            thread.join()
    if errors:
        raise errors.pop(min(errors))
    if not all(done):
        raise RuntimeError("the process was forked inside this call, whose threads are lost")
