"""Processes of MPI: each has a share, and together they have what one process has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cupy_delta import parallel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDERS = [str(x) for x in (ROOT, HERE, HERE.parent)]


def mpi(size, *command):
    """Run Python on several ranks, with the MPI that is installed beside it; return what it says.

    A rank computes in one thread: there are as many of them as processors, or more.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(FOLDERS),
        "CUPY_DELTA_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher(), "-n", str(size), sys.executable, "-m", "mpi4py", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launcher():
    """mpiexec, that of this Python if it has one, to start ranks here: of MPICH or of Open MPI."""
    own = Path(sys.executable).parent / "mpiexec"
    found = str(own) if own.exists() else shutil.which("mpiexec")
    assert found, "no mpiexec: pip install mpich"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    if "HYDRA" in version.stdout.upper():
        return [found, "-launcher", "fork"]
    return [found, "--oversubscribe", "--allow-run-as-root"]


@pytest.mark.parametrize(
    "size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_have_together_what_one_has(size):
    deviation, *errors = mpi(size, HERE / "mpi_program.py").splitlines()
    assert float(deviation) < 1e-12
    wanted = (
        "TypeError: dtype of q, k and v: expected the same on every rank,"
        " got float64 on rank 0 and float32 on rank 1"
    )
    assert errors == [wanted] * size


class Silent:
    """An MPI whose other rank never answers."""

    def Dup(self):
        return self

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def Iallgather(self, sent, received):
        return self

    Isend = Irecv = lambda self, *arguments: self

    def Test(self):
        return False


def test_a_rank_that_does_not_answer_is_an_error_in_time():
    communicator = parallel.MPICommunicator(Silent(), timeout=0.05)
    with pytest.raises(TimeoutError, match=r"^all_gather: no answer from another rank within 0.05"):
        communicator.all_gather(np.zeros(3))
    with pytest.raises(TimeoutError, match=r"^shift: no answer"):
        communicator.shift(np.zeros(3), 1)


class Echo(Silent):
    """An MPI of one rank that remembers what memory it was given."""

    def Get_size(self):
        return 1

    def Iallgather(self, sent, received):
        self.given = sent, received
        received[0] = sent
        return self

    def Test(self):
        return True


@pytest.mark.parametrize("device_buffers", [False, True])
def test_arrays_of_a_device_go_through_the_host_or_as_they_are(cupy, device_buffers):
    mpi = Echo()
    communicator = parallel.MPICommunicator(mpi, device_buffers=device_buffers)
    x = cupy.asarray(np.arange(3.0))
    found = communicator.all_gather(x)
    assert [type(y) is cupy.ndarray for y in mpi.given] == [device_buffers] * 2
    assert type(found) is cupy.ndarray
    np.testing.assert_array_equal(found, [[0, 1, 2]])
    assert type(communicator.all_gather(np.ones(3))) is np.ndarray
    assert communicator.shift(x, 1) is None
