"""CuPy arrays over MPI: staged through the host, and as they are. Run with tests/gpu.

Ranks share a GPU where there is one. An MPI that is CUDA-aware is not told from others: say so with
CUPY_DELTA_CUDA_AWARE_MPI=1.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("device_buffers", [False, True])
def test_cupy_arrays_of_processes(device_buffers):
    for module in ("cupy", "mpi4py"):
        pytest.importorskip(module)
    if device_buffers and not os.environ.get("CUPY_DELTA_CUDA_AWARE_MPI"):
        pytest.skip("whether this MPI is CUDA-aware was not said")
    from test_mpi import HERE, mpi

    words = ["cupy", *["device"] * device_buffers]
    deviation, *errors = mpi(2, HERE / "mpi_program.py", *words).splitlines()
    assert float(deviation) < 1e-4
    assert all("dtype of q, k and v: expected the same on every rank" in x for x in errors)
