"""Every kernel compiles for every architecture, without spilling or growing; no GPU needed.

After a wanted change: python tests/cuda/resources.py --write
"""

import json

import nvrtc
import pytest
import resources

GOLDEN = json.loads(resources.GOLDEN.read_text())
MARGIN = 8  # registers: ptxas' choices move a little with unrelated code
CASES = [(arch, name) for arch in resources.ARCHITECTURES for name in resources.launches(arch)]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_kernel_compiles_within_its_resources(arch, name):
    measured = resources.measure(arch, name)
    known = resources.Resources(*GOLDEN[arch][name])
    assert measured.registers <= known.registers + MARGIN
    assert measured.spilled <= known.spilled
    if resources.must_not_spill(name):
        assert measured.spilled == 0
    shared = resources.launches(arch)[name].shared + measured.static_shared
    assert shared <= resources.ARCHITECTURES[arch].shared_bytes


def test_the_table_has_no_kernel_that_is_gone():
    assert {(arch, name) for arch in GOLDEN for name in GOLDEN[arch]} == set(CASES)


def test_every_kernel_file_is_measured():
    measured = {launch.file for launch in resources.launches("sm_80").values()}
    assert measured == {path.name for path in nvrtc.KERNELS.glob("*.cu")} - {"affine.cu"}


def test_a_spill_is_seen():
    """The log is really read: a kernel that needs more registers than it may have spills."""
    source = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {
  float r[64];
  for (int i = 0; i < 64; i++) r[i] = x[i * 1024 + threadIdx.x];
  for (int j = 0; j < n; j++)
    for (int i = 0; i < 64; i++) r[i] = r[i] * r[(i + 1) % 64] + r[(i + 7) % 64];
  for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = r[i];
}
"""
    measured = resources.compiled(source, "sm_80")
    assert measured.registers <= 32
    assert measured.spilled > 0
