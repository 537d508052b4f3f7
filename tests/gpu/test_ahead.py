"""What was compiled without a GPU is what a first call on one loads: nothing is compiled again."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

FIRST_CALL = """
import sys
import ml_dtypes, numpy as np
import cupy
from cupy.cuda import compiler
compiled, right = [], compiler._NVRTCProgram.compile
def compile(program, *args):
    if "kernels" in program.src or "nothing" in program.src:
        compiled.append(program.src)
    return right(program, *args)
compiler._NVRTCProgram.compile = compile
import cupy_delta
K = int(sys.argv[1])
draw = np.random.default_rng(0).standard_normal
x = [cupy.asarray(draw((1, 1024, 16, K)), ml_dtypes.bfloat16) for _ in range(3)]
beta = cupy.ones((1, 1024, 16), cupy.float32)
o, state = cupy_delta.chunk_delta_rule(*x, beta, qk_l2norm=True)
assert bool(cupy.isfinite(state).all())
print(len(compiled))
"""


def test_a_first_call_on_a_gpu_compiles_nothing_more(tmp_path):
    import cupy

    capability = cupy.cuda.Device().compute_capability
    env = os.environ | {
        "CUPY_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def python(*argv, **more):
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, env=env | more, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sm_count = cupy.cuda.Device().attributes["MultiProcessorCount"]
    argv = ["compile", "--arch", f"sm_{capability}", "--multiprocessors", str(sm_count)]
    python("-m", "cupy_delta", *argv, "--K", "128", "--qk-l2norm", CUDA_VISIBLE_DEVICES="")
    assert python("-c", FIRST_CALL, "128") == "0\n"
    assert int(python("-c", FIRST_CALL, "64")) > 0
