"""Every kernel compiles for every architecture, without spilling or growing; no GPU needed.

After a wanted change: python tests/cuda/resources.py --write
"""

import shutil

import ml_dtypes
import nvrtc
import pytest
import resources
from helpers import make_inputs

from cupy_delta.cuda.runtime.sources import variant_source
from cupy_delta.cuda.tokens.decode import decode_launch
from cupy_delta.problem import step_problem

MARGIN = 8  # registers: ptxas' choices move a little with unrelated code
CASES = resources.cases()
FILES = sorted({x.file for x in resources.launches("sm_90").values()})


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_kernel_compiles_within_its_resources(arch, name):
    known, measured = resources.table()[arch, name].resources, resources.row(arch, name).resources
    assert measured.registers <= known.registers + MARGIN
    assert measured.spilled <= known.spilled
    assert not measured.serialised
    if resources.must_not_spill(name):
        assert measured.spilled == 0
    shared = resources.launches(arch)[name].shared + measured.static_shared
    assert shared <= resources.ARCHITECTURES[arch].shared_bytes


@pytest.mark.parametrize("file", FILES)
def test_rows_of_the_table_are_what_comes_out(file):
    """Of every kernel file one for 9.0, compiled although the table has it."""
    name = next(n for n, x in resources.launches("sm_90").items() if x.file == file)
    assert resources.row("sm_90", name).resources == resources.measure("sm_90", name)


def test_a_kernel_that_was_changed_is_compiled(monkeypatch, tmp_path):
    """Also if it is a file that it includes that was."""
    name = next(n for n, x in resources.launches("sm_80").items() if x.entry == "l2norm")
    known = resources.row("sm_80", name)
    wanted = resources.Resources(1, 2, 3, True)
    monkeypatch.setattr(resources, "measure", lambda *case: wanted)
    assert resources.row("sm_80", name) == known == resources.table()["sm_80", name]
    shutil.copytree(nvrtc.KERNELS, tmp_path / "kernels")
    monkeypatch.setattr(nvrtc, "KERNELS", tmp_path / "kernels")
    assert resources.row("sm_80", name) == known
    header = tmp_path / "kernels" / "primitives" / "device.cuh"
    header.write_text(header.read_text() + "\n")
    assert resources.row("sm_80", name).resources == wanted


@pytest.mark.parametrize("file", sorted({x.file for x in resources.launches("sm_89").values()}))
def test_what_8_9_has_is_what_8_6_has(file):
    """Of every kernel file one, compiled for both: why `cases` leaves out what they share."""
    names = [name for name, x in resources.launches("sm_89").items() if x.file == file]
    name = next(name for name in names if name in resources.launches("sm_86"))
    one, other = resources.measure("sm_86", name), resources.measure("sm_89", name)
    assert abs(one.registers - other.registers) <= MARGIN
    assert one._replace(registers=0) == other._replace(registers=0)


def test_the_table_has_no_kernel_that_is_gone():
    assert set(resources.table()) == set(CASES)


def test_every_kernel_file_is_measured():
    measured = {x.file for arch in ("sm_80", "sm_90") for x in resources.launches(arch).values()}
    assert measured == {
        path.relative_to(nvrtc.KERNELS).as_posix() for path in nvrtc.KERNELS.rglob("*.cu")
    }


@pytest.mark.parametrize("arch", resources.ARCHITECTURES)
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_decoding_16_bit_states_are_many_bytes_at_once(arch, layout):
    """Their tiles, of many states, are on the way to registers: of all blocks that are there."""
    sizes = dict(K=128, V=128, layout=layout, dtype=ml_dtypes.bfloat16)
    args, kw = make_inputs(1, B=160, initial=True, **sizes)
    state = dict(state=kw["initial_state"].astype(ml_dtypes.bfloat16), state_indices=None)
    options = dict(scale=None, qk_l2norm=True, state_layout=layout, out=None)
    launch = decode_launch(step_problem(*args, **state, **options))
    measured = resources.compiled(variant_source(launch.file, launch.macros), arch)
    together = 65536 // (-(-measured.registers // 8) * 8 * launch.block)
    assert together * 128 * dict(launch.defines)["CHANNELS"] * 2 >= 48 * 1024
    assert measured.spilled == 0


def test_serialised_wgmma_is_seen():
    """The log is really read: sums that are touched while the tensor cores have them."""
    source = """
#define CHUNK 64
#include "primitives/hopper.cuh"
extern "C" __global__ void __launch_bounds__(128) touch(float* x, uint64_t a, uint64_t b) {
  float d[8][4];
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 4; i++) d[j][i] = x[(j * 4 + i) * 128 + threadIdx.x];
  wgmma_fence();
  wgmma<bf16, false, false>(d, a, b, true);
  wgmma_commit();
  if (TOUCHED) d[0][0] += 1.0f;
  wgmma<bf16, false, false>(d, a, b, true);
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 4; i++) x[(j * 4 + i) * 128 + threadIdx.x] = d[j][i];
}
"""
    for touched in (1, 0):
        measured = resources.compiled(f"#define TOUCHED {touched}\n{source}", "sm_90a")
        assert measured.serialised == touched


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
