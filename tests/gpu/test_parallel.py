"""Shares of several GPUs over NCCL against one GPU. Run with tests/gpu, where there are two."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "scaling.py"


def test_shares_errors_and_a_rank_that_dies():
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    command = [sys.executable, SCRIPT, "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
