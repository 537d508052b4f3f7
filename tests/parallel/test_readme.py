"""The program for several GPUs in README.md, on processes of MPI and NumPy arrays."""

import re

from test_mpi import ROOT, mpi

# What names a GPU, and what stands there instead.
ELSEWHERE = {
    r"^import cupy$": "import numpy as cupy",
    r"^from cupy\.cuda import nccl$": "",
    r"^cupy\.cuda\.Device.*$": "",
    r"^name = world\.bcast.*$": "",
    r"parallel\.NCCLCommunicator\(.*\)$": "parallel.MPICommunicator(world)",
    r"65536": "40",
}
AFTER = """
import cupy_delta
every = [world.allgather(x) for x in (q, k, v, beta, o, gradients.k)]
q, k, v, beta, o, dk = (cupy.concatenate(x, axis=1) for x in every)
wanted = cupy_delta.chunk_delta_rule_fwd(q, k, v, beta, qk_l2norm=True)
wanted_dk = cupy_delta.chunk_delta_rule_bwd(wanted.residuals, o).k
if world.rank == 1:
    print(abs(o - wanted.o).max(), abs(dk - wanted_dk).max(), state.shape)
"""


def program():
    """Return the program of the README, which is the block that has NCCL in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [x for x in blocks if "nccl" in x]
    return found


def test_the_program_for_several_gpus(tmp_path):
    text = program()
    assert len(text.splitlines()) <= 15
    for pattern, other in ELSEWHERE.items():
        text, count = re.subn(pattern, other, text, flags=re.MULTILINE)
        assert count, pattern
    file = tmp_path / "program.py"
    file.write_text(text + AFTER)
    o, dk, shape = mpi(2, file).split(maxsplit=2)
    assert float(o) < 1e-5
    assert float(dk) < 1e-4
    assert shape.strip() == "(1, 16, 128, 128)"
