"""cupy_delta.jax on a real GPU, captured in command buffers and not. Run with tests/gpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "jax_gpu.py"


def test_right_and_captured():
    environment = {n: x for n, x in os.environ.items() if n not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, SCRIPT, "--quick"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
