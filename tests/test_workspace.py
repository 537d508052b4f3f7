"""Workspaces: which buffer a call gets, and who has entered what; no device needed."""

import threading

import numpy as np

from cupy_delta import Workspace
from cupy_delta.workspace import current, left_aside


def test_a_buffer_per_device_name_shape_and_dtype():
    workspace = Workspace()
    first = workspace.take(0, "o", (2, 3), np.float32, np.empty)
    assert workspace.take(0, "o", (2, 3), np.float32, np.empty) is first
    for other in [(1, "o", (2, 3), np.float32), (0, "p", (2, 3), np.float32)]:
        assert workspace.take(*other, np.empty) is not first
    assert workspace.take(0, "o", (3, 2), np.float32, np.empty) is not first
    assert workspace.nbytes == 4 * 24


def test_the_innermost_counts_and_may_be_left_aside():
    outer, inner = Workspace(), Workspace()
    assert current() is None
    with outer:
        with inner:
            assert current() is inner
            with left_aside():
                assert current() is None
            assert current() is inner
        assert current() is outer
    assert current() is None


def test_threads_that_share_one_keep_their_own_outer_ones():
    shared, mine = Workspace(), Workspace()
    seen = []

    def other():
        with shared:
            entered.set()
            leave.wait()
        seen.append(current())

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    with mine:
        thread.start()
        entered.wait()
        with shared:
            leave.set()
            thread.join()
        assert current() is mine
    assert seen == [None]
