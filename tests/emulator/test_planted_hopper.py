"""Every planted mistake with mbarriers, TMA and wgmma must be found, as in test_planted_bugs.py."""

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorFault, Kernel, Run, copy_in, empty
from planted import check_kind, check_located
from tensor_map import tensor_map

SOURCE = Path(__file__).resolve().parent / "kernels" / "planted_hopper.cu"
SHARED = 3 * 64 * 64 * 2 + 32
TILES = 5

# The kind of fault, and words that its message must have.
EXPECTED = {
    "NO_FULL_WAIT": (
        "async-hazard",
        "unordered with the write by copies for the mbarrier shared 'full'",
    ),
    "PARITY": ("async-hazard", "read of shared 'stages'"),
    "ROUND": ("mbarrier", "parity 2, expected 0 or 1"),
    "EARLY_RELEASE": ("async-hazard", "unordered with the read by wgmma of warp"),
    "NO_WGMMA_WAIT": ("async-hazard", "read of sums before the wait for the wgmma at"),
    "LATE_WGMMA_WAIT": ("async-hazard", "read of sums before the wait for the wgmma at"),
    "TOUCHED_SUMS": ("async-hazard", "sums before the wait for the wgmma at"),
    "NO_WGMMA_FENCE": ("wgmma", "no wgmma_fence"),
    "NO_PROXY_FENCE": ("proxy", "tma_store read of shared 'copy' byte 0, no async_proxy_fence"),
    "NO_COPY_BARRIER": ("uninitialised", "wgmma read of shared 'copy'"),
    "UNINITIALISED": ("uninitialised", "tma_store read of shared 'copy'"),
    "FEW_BYTES": ("async-hazard", "complete with copies in flight"),
    "MANY_BYTES": ("deadlock", "shared 'full' byte 0: phase 0 misses 0 of 1 arrivals and 16 bytes"),
    "ARRIVALS": ("mbarrier", "more than the 1 arrivals"),
    "NO_BARRIER": ("mbarrier", "unordered with the mbarrier_init by thread 0"),
    "NO_INIT": ("mbarrier", "no mbarrier was initialised at shared 'empty' byte 0"),
    "NO_INIT_FENCE": ("mbarrier", "no mbarrier_init_fence by thread 0"),
    "NO_STORE_WAIT": ("async-hazard", "unordered with the read by tma_store of thread 128"),
    "SAME_PLACE": ("async-hazard", "tma_store write to 'y'"),
    "STORE_AT_EXIT": ("async-hazard", "exits while a tma_store"),
    "LOAD_AT_END": ("async-hazard", "nobody has waited for the copy"),
    "NOT_SHARED": ("bad-address", "is not in shared memory"),
    "MISALIGNED_BOX": ("misaligned", "no multiple of 1024"),
    "BOX_OVERRUN": ("out-of-bounds", "past the end of shared 'stages' (16384 bytes)"),
    "OPERAND_ALIGN": ("misaligned", "wgmma operand"),
    "OPERAND_END": ("out-of-bounds", "past the end of shared 'copy' (8192 bytes)"),
    "OPERAND_LANES": ("divergence", "operands of wgmma differ between lanes 0 and 8"),
    "DESCRIPTOR": ("wgmma", "no descriptor"),
    "INIT_TWICE": ("mbarrier", "initialised twice"),
    "INIT_ALIGN": ("misaligned", "mbarrier at shared address"),
    "STMATRIX_ALIGN": ("misaligned", "stmatrix row"),
    "STMATRIX_ROW": (
        "out-of-bounds",
        "stmatrix write of 2 bytes, 0 bytes past the end of shared 'copy'",
    ),
    "PRODUCT_AT_EXIT": ("async-hazard", "exits without wgmma_wait"),
    "UNIFORM": ("divergence", "uniform of 6, and of 5 in lane 0"),
    "ONE_WARP": ("divergence", "issued 20 and 21 wgmmas"),
}
NO_LINE = {"STORE_AT_EXIT", "PRODUCT_AT_EXIT", "ONE_WARP"}
# What compiled code shows in another way, or not at all: its registers move before the wait, and
# its shared memory is one array without names.
UNSEEN_IN_PTX = {"LATE_WGMMA_WAIT", "TOUCHED_SUMS", "BOX_OVERRUN", "OPERAND_END", "STMATRIX_ROW"}
UNSEEN_IN_PTX |= {"UNIFORM"}  # there it is a shuffle


def launch(bug=None, run=None, leg="source"):
    kernel = Kernel(SOURCE, "planted", {f"BUG_{bug}": 1} if bug else None, sm=90, leg=leg)
    x = np.random.default_rng(0).standard_normal((TILES * 64, 64)).astype(ml_dtypes.bfloat16)
    given, y = copy_in(x, "x"), empty(x.shape, x.dtype, "y")
    sums = empty((32, 128), np.float32, "sums")
    maps = [tensor_map(v, (1, TILES * 64, 1, 64), (1, 32, 1, 64)) for v in (given, y)]
    kernel.launch(1, 256, SHARED, [*maps, sums, np.int32(TILES)], run or Run())
    return x, y, sums


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random"])
@pytest.mark.parametrize("completion", ["late", "early", "either"])
@pytest.mark.parametrize("preempt", [0, 30])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_the_right_kernel_has_no_findings(schedule, completion, preempt, leg):
    for seed in range(3 if schedule == "random" else 1):
        x, y, sums = launch(run=Run(schedule, completion, preempt, seed), leg=leg)
        assert np.array_equal(x, y)
        tiles = x.astype(np.float64).reshape(TILES, 64, 64)
        total = np.einsum("tik,tjk->ij", tiles, tiles)
        # Element (8 h + g, 8 j + 2 c + i) of warp w's rows is d[j][2 h + i] of its lane 4 g + c.
        d = total.reshape(4, 2, 8, 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        assert np.allclose(sums, d.reshape(32, 128), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bug", EXPECTED)
def test_planted_bug_is_found_and_located(bug):
    name = "OPERAND" if bug.startswith("OPERAND") else bug
    check_located(lambda: launch(bug), EXPECTED[bug], SOURCE, name, has_line=bug not in NO_LINE)


@pytest.mark.parametrize("bug", sorted(EXPECTED.keys() - UNSEEN_IN_PTX))
def test_planted_bug_is_found_in_compiled_code(bug):
    check_kind(lambda: launch(bug, leg="ptx"), EXPECTED[bug][0])


@pytest.mark.parametrize(
    "bug", ["EARLY_RELEASE", "NO_STORE_WAIT", "NO_PROXY_FENCE", "NO_WGMMA_WAIT", "FEW_BYTES"]
)
def test_planted_bug_is_found_in_any_order_of_events(bug):
    for seed in range(5):
        run = Run(schedule="random", completion="either", preempt=30, seed=seed)
        check_kind(partial(launch, bug, run), "async-hazard", "proxy", "deadlock")


def test_sums_read_before_the_wait_are_nan():
    _, _, sums = launch("LATE_WGMMA_WAIT", Run(check=False))
    assert np.isnan(sums).all()


def test_an_argument_that_is_no_tensor_map():
    kernel = Kernel(SOURCE, "planted", sm=90)
    nothing = np.zeros((), "V128")[()]
    sums = empty((32, 128), np.float32, "sums")
    with pytest.raises(EmulatorFault, match="bad-address: no tensor map"):
        kernel.launch(1, 256, SHARED, [nothing, nothing, sums, np.int32(TILES)])
