"""Items shared among threads: every one once, errors in order, also when threads cannot be had."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest

from cupy_delta import threads
from cupy_delta.threads import side_by_side

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_every_item_is_done_once_and_no_thread_is_left(count):
    done, before = [], threading.active_count()
    side_by_side(done.append, range(20), count)
    assert sorted(done) == list(range(20))
    assert threading.active_count() == before
    side_by_side(done.append, [], count)
    assert len(done) == 20


def test_as_many_threads_as_are_asked_for_begin_and_the_calling_one_works():
    begun, worked, meeting = [], [], threading.Barrier(3)

    def work(item):
        meeting.wait(60)  # breaks unless all three are here
        worked.append(threading.get_ident())

    side_by_side(work, range(3), 3, lambda: begun.append(threading.get_ident()))
    assert threading.get_ident() in worked and len(set(worked)) == 3
    assert sorted([*begun, threading.get_ident()]) == sorted(worked)


@pytest.mark.parametrize("count", [1, 4])
def test_the_error_of_the_first_item_is_raised_and_no_more_is_begun(count):
    begun = []

    def fail(item):
        begun.append(item)
        raise ValueError(item)

    with pytest.raises(ValueError, match=r"^0$"):
        side_by_side(fail, range(100), count)
    assert len(begun) <= count


def test_an_interruption_ends_the_call_once_threads_are_gone():
    held, before = threading.Event(), threading.active_count()

    def work(item):
        if threading.current_thread() is not threading.main_thread():
            held.wait(60)
            return
        threading.Timer(0.05, held.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(100), 2)
    assert held.is_set()
    assert threading.active_count() <= before + 1  # the timer's may be about to end


@pytest.mark.parametrize("can", [0, 1])
def test_fewer_threads_do_all_of_the_work(monkeypatch, can):
    """As in a container that limits them, or while the interpreter takes itself down."""
    started, start, done = [], threading.Thread.start, []

    def limited(thread):
        if len(started) == can:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threads.Thread, "start", limited)
    side_by_side(done.append, range(30), 4)
    assert sorted(done) == list(range(30))


def test_a_failed_call_keeps_nothing():
    class Item:
        pass

    def fail(item):
        raise ValueError

    item = Item()
    kept = weakref.ref(item)
    gc.disable()
    try:
        with pytest.raises(ValueError):
            side_by_side(fail, [item], 1)
        del item
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")
def test_a_child_that_has_lost_the_threads_of_its_call_says_so():
    """As a signal's handler may fork."""
    inside, leave, pids = threading.Event(), threading.Event(), []

    def work(item):
        if threading.current_thread() is threading.main_thread():
            inside.wait(60)
            pids.append(os.fork())
            leave.set()
        else:
            inside.set()
            leave.wait(60)

    try:
        side_by_side(work, range(2), 2)
    except RuntimeError as error:
        os._exit(7 if "forked" in str(error) else 1)
    finally:
        if pids == [0]:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a thread", "at exit"])
def test_calls_when_the_main_thread_has_come_to_its_end(how):
    """A thread may outlive it, and what runs at exit comes after it."""
    code = """
        import atexit, sys, threading
        import numpy as np
        import cupy_delta
        from cupy_delta.reference import parallel
        parallel.PRODUCTS_FOR_THREADS = 0
        x = np.random.default_rng(0).standard_normal((2, 300, 6, 16))
        def call():
            return float(cupy_delta.chunk_delta_rule(x, x, x, x[..., 0], qk_l2norm=True).o.sum())
        expected = call()
        def late():
            if threading.current_thread() is not threading.main_thread():
                threading.main_thread().join()
            print(call() == expected)
        if sys.argv[1] == "at exit":
            atexit.register(late)
        else:
            threading.Thread(target=late).start()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), how],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUPY_DELTA_NUM_THREADS": "3"},
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
