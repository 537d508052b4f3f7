"""An emulator that stops finding mistakes is worse than none: every planted one must be found."""

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import nvrtc
import pytest
from emulator import EmulatorFault, Kernel, Run, copy_in, empty
from planted import check_kind, check_located

SOURCE = Path(__file__).resolve().parent / "kernels" / "planted.cu"
SHARED = 3712
BLOCKS = 3

# The kind of fault, and words that its message must have.
EXPECTED = {
    "NO_BARRIER": ("uninitialised", "ldmatrix read of shared 'tiles'"),
    "NO_SYNCWARP": ("uninitialised", "read of shared 'products'"),
    "REUSE": ("race", "shared 'totals'"),
    "NO_WAIT": ("async-hazard", "ldmatrix read of shared 'tiles'"),
    "WEAK_WAIT": ("async-hazard", "ldmatrix read of shared 'tiles'"),
    "SHARED_OVERRUN": ("out-of-bounds", "0 bytes past the end of shared 'totals' (64 bytes)"),
    "NEIGHBOUR": ("out-of-bounds", "0 bytes past the end of shared 'products' (1088 bytes)"),
    "GLOBAL_OVERRUN": ("out-of-bounds", "past the end of 'sums'"),
    "LDMATRIX_ROW": ("out-of-bounds", "past the end of shared 'tiles'"),
    "LDMATRIX_ALIGN": ("misaligned", "ldmatrix row"),
    "DIVERGENT_BARRIER": ("divergent-barrier", "__syncthreads of lines"),
    "LANE_BARRIER": ("divergent-barrier", "__syncthreads of lines"),
    "EARLY_EXIT": ("divergent-barrier", "exits while 63 threads wait"),
    "LANE_MMA": ("divergence", "lanes"),
    "UNINITIALISED": ("uninitialised", "read of shared 'products' byte 64, never written"),
    "REGISTER_ARRAY": ("undefined-behaviour", "array index"),
    "TWO_BLOCKS": ("race", "a thread of another block"),
    "TWO_WARPS": ("race", "write to shared 'totals'"),
    "MISALIGNED": ("undefined-behaviour", "alignment"),
    "COPY_AT_EXIT": ("async-hazard", "exits with cp.async in flight"),
    "BARRIER_COUNT": ("bad-barrier", "barrier 1 met with 64 and with 32 threads"),
}
# What is left of them in the compiled code, where shared memory is one array without names.
EXPECTED_OF_PTX = {
    "NO_BARRIER": "uninitialised",
    "NO_SYNCWARP": "uninitialised",
    "REUSE": "race",
    "NO_WAIT": "async-hazard",
    "WEAK_WAIT": "async-hazard",
    "GLOBAL_OVERRUN": "out-of-bounds",
    "LDMATRIX_ALIGN": "misaligned",
    "EARLY_EXIT": "divergent-barrier",
    "LANE_MMA": "divergence",
    "UNINITIALISED": "uninitialised",
    "TWO_BLOCKS": "race",
    "TWO_WARPS": "race",
    "MISALIGNED": "misaligned",
    "COPY_AT_EXIT": "async-hazard",
    "BARRIER_COUNT": "bad-barrier",
}


def arguments():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BLOCKS, 2, 16, 32)).astype(ml_dtypes.bfloat16)
    y = empty((BLOCKS, 2, 16, 16), np.float32, "y")
    sums = empty((BLOCKS, 2, 16), np.float32, "sums")
    return [copy_in(x, "x"), y, sums, copy_in(np.zeros(1, np.int32), "count")]


def launch(bug=None, run=None, shared=SHARED, leg="source"):
    kernel = Kernel(SOURCE, "planted", {f"BUG_{bug}": 1} if bug else None, leg=leg)
    args = arguments()
    counts = kernel.launch(BLOCKS, 64, shared, args, run or Run())
    return args, counts


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random"])
@pytest.mark.parametrize("completion", ["late", "early", "either"])
@pytest.mark.parametrize("preempt", [0, 30])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_the_right_kernel_has_no_findings(schedule, completion, preempt, leg):
    for seed in range(3 if schedule == "random" else 1):
        run = Run(schedule=schedule, completion=completion, preempt=preempt, seed=seed)
        (x, y, sums, count), counts = launch(run=run, leg=leg)
        x = x.astype(np.float32)
        exact = x @ x.swapaxes(-1, -2)
        assert np.allclose(y, exact, atol=1e-4)
        assert np.allclose(sums, exact.sum(-1), atol=1e-3)
        assert count[0] == BLOCKS
        assert counts["accesses"] > 0 and counts["barriers"] >= 4 * BLOCKS


@pytest.mark.parametrize("bug", EXPECTED)
def test_planted_bug_is_found_and_located(bug):
    # A thread that exits does so on no line.
    lines_of, has_line = r"(?:planted\.cu:|lines |and )(\d+)", bug != "COPY_AT_EXIT"
    check_located(lambda: launch(bug), EXPECTED[bug], SOURCE, bug, lines_of, has_line)


@pytest.mark.parametrize("bug", EXPECTED_OF_PTX)
def test_planted_bug_is_found_in_compiled_code(bug):
    check_kind(lambda: launch(bug, leg="ptx"), EXPECTED_OF_PTX[bug])


@pytest.mark.parametrize("bug", ["REUSE", "TWO_WARPS", "NO_SYNCWARP", "NO_WAIT"])
def test_planted_race_is_found_in_any_schedule(bug):
    for seed in range(5):
        run = Run(schedule="random", completion="either", preempt=30, seed=seed)
        check_kind(partial(launch, bug, run), "race", "async-hazard", "uninitialised")


def test_too_little_shared_memory():
    with pytest.raises(EmulatorFault, match="shared-layout: 'totals' ends at byte"):
        launch(shared=SHARED - 4)


def test_too_much_shared_memory():
    with pytest.raises(EmulatorFault, match=f"shared-layout: the launch gave {SHARED + 16} bytes"):
        launch(shared=SHARED + 16)


@pytest.mark.parametrize("given", [64, 80])
def test_a_kernel_for_other_shared_memory_is_refused(tmp_path, given):
    """By the emulator when it runs, by the compiler, which finds no such function, before."""
    path = tmp_path / "carved.cu"
    path.write_text(
        '#include "primitives/primitives.cuh"\n'
        'extern "C" __global__ void carved() {\n'
        "  DynSmem smem;\n"
        '  smem.take<float>(16, "sums")[threadIdx.x] = 0.0f;\n'
        "  smem.all_taken(SHARED_BYTES);\n}\n"
    )
    source = f"#define SHARED_BYTES {given}\n{path.read_text()}"
    run = partial(Kernel(path, "carved", dict(SHARED_BYTES=given)).launch, 1, 1, 64, [])
    if given == 64:
        run()
        nvrtc.compile_source(source, "sm_80")
        return
    with pytest.raises(EmulatorFault, match="shared-layout: the kernel takes 64 bytes"):
        run()
    with pytest.raises(nvrtc.CompileError, match="shared_memory_is_not_what_the_launch_gives"):
        nvrtc.compile_source(source, "sm_80")


def test_wrong_arguments():
    kernel = Kernel(SOURCE, "planted")
    args = arguments()
    with pytest.raises(EmulatorFault, match="takes 4 arguments, got 3"):
        kernel.launch(BLOCKS, 64, SHARED, args[:3])
    with pytest.raises(EmulatorFault, match="argument 3 of planted has 8 bytes, got int32 of 4"):
        kernel.launch(BLOCKS, 64, SHARED, [*args[:3], np.int32(1)])
    with pytest.raises(EmulatorFault, match="bad-launch: 2048 threads"):
        kernel.launch(1, 2048, SHARED, args)


def test_livelock_ends():
    with pytest.raises(EmulatorFault, match="livelock"):
        launch(run=Run(max_steps=10))


def test_wrong_values_of_a_copy_never_waited_for_are_nan():
    kernel = Kernel(SOURCE, "planted", {"BUG_NO_WAIT": 1})
    args = arguments()
    kernel.launch(1, 64, SHARED, args, Run(check=False))
    assert np.isnan(args[1][0, 0]).all()


def test_a_kernel_may_not_write_ptx_or_static_shared_memory(tmp_path):
    for line in ('asm("nop;");', "__shared__ float x;"):
        path = tmp_path / "bad.cu"
        path.write_text(
            f'#include "primitives/primitives.cuh"\nextern "C" __global__ void bad() {{ {line} }}\n'
        )
        with pytest.raises(RuntimeError, match=r"poisoned|USE_DynSmem"):
            Kernel(path, "bad")
