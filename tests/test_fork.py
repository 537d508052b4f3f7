"""Children of a fork compute, whatever other threads were at when it came."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import cupy_delta
from cupy_delta.forking import whole_at_fork
from cupy_delta.reference import parallel

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    # Of JAX, where its tests ran before in the same process.
    pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning"),
]


def inputs():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 20, 2, 8))
    return q, k, v, rng.uniform(0, 1, (1, 20, 2))


def blas_threads():
    return [library.get_num_threads() for library in parallel._blas_libraries()]


def two_blas_threads():
    for library in parallel._blas_libraries():
        parallel._set(library, 2)


def in_child(function, seconds=30):
    """Return what a function returns in a forked child, as JSON; a child that hangs is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            import signal

            signal.alarm(seconds)
            os.write(writer, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    assert text, "the child hung or failed"
    return json.loads(text)


@pytest.fixture
def computing():
    """Another thread that is in the middle of a call, for as long as the test runs."""
    entered, leave = threading.Event(), threading.Event()
    item = lambda: entered.set() or leave.wait(60)  # noqa: E731
    thread = threading.Thread(target=parallel.for_each, args=(item, [()]))
    thread.start()
    assert entered.wait(60)
    yield
    leave.set()
    thread.join()


def test_a_child_knows_nothing_of_the_calls_of_other_threads(monkeypatch, request):
    monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", "1")
    two_blas_threads()
    before = blas_threads()
    request.getfixturevalue("computing")
    assert set(blas_threads()) == {1} and set(before) == {2}

    def child():
        at_start, inside = blas_threads(), []
        parallel.for_each(lambda: inside.append(blas_threads()), [()])
        return at_start, inside[0], blas_threads(), len(parallel._inside)

    assert in_child(child) == [before, [1] * len(before), before, 0]
    assert set(blas_threads()) == {1}, "the parent's call goes on"


def test_a_child_forked_within_a_call_ends_it_like_its_parent():
    """As by a signal's handler: the child returns into the call."""
    two_blas_threads()
    before, found = blas_threads(), []

    def forks():
        found.append(in_child(lambda: (blas_threads(), len(parallel._inside))))

    parallel.for_each(forks, [()])
    assert found == [[[1] * len(before), 1]]
    assert blas_threads() == before and not parallel._inside


def test_a_fork_waits_for_what_must_be_whole():
    held, leave = threading.Event(), threading.Event()

    def hold():
        with whole_at_fork:
            held.set()
            leave.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    total = in_child(lambda: float(cupy_delta.chunk_delta_rule(*inputs()).o.sum()))
    thread.join()
    expected = float(cupy_delta.chunk_delta_rule(*inputs()).o.sum())
    assert total == expected


def script(code, *argv):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.1])
def test_a_fork_during_the_first_call(delay):
    code = """
        import os, signal, sys, threading, time
        import numpy as np
        import cupy_delta
        x = np.ones((1, 4, 2, 8))
        def first():
            return float(cupy_delta.chunk_delta_rule(x, x, x, x[..., 0], qk_l2norm=True).o.sum())
        thread = threading.Thread(target=first)
        thread.start()
        time.sleep(float(sys.argv[1]))
        if (pid := os.fork()) == 0:
            signal.alarm(30)
            first()
            os._exit(0)
        print(os.waitpid(pid, 0)[1])
        thread.join()
    """
    assert script(code, str(delay)) == "0\n"


@pytest.mark.slow
def test_no_child_of_many_hangs():
    """1,000 of them take a minute and more: CUPY_DELTA_TEST_FORKS=1000."""
    code = """
        import os, signal, sys, threading
        import numpy as np
        import cupy_delta
        x = np.ones((1, 4, 2, 8)) / 8
        state = np.zeros((1, 2, 8, 8))
        def call():
            cupy_delta.chunk_delta_rule(x, x, x, x[..., 0], qk_l2norm=True)
            cupy_delta.delta_rule_step(x, x, x, x[..., 0], state=state.copy())
        call()
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                call()
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        ends = []
        for _ in range(int(sys.argv[1])):
            if (pid := os.fork()) == 0:
                signal.alarm(20)
                call()
                os._exit(0)
            ends.append(os.waitpid(pid, 0)[1])
        stop.set()
        for thread in threads:
            thread.join()
        print(len(ends), set(ends))
    """
    forks = os.environ.get("CUPY_DELTA_TEST_FORKS", "100")
    assert script(code, forks) == f"{forks} {{0}}\n"
