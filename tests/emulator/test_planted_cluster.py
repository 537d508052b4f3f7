"""Clusters: what they exchange, and every planted mistake, as in test_planted_bugs.py."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatorFault, Kernel, Run, copy_in, empty
from planted import check_kind, check_located, plant_in_primitives

SOURCE = Path(__file__).resolve().parent / "kernels" / "planted_cluster.cu"
SHARED = 544
ROUNDS = 3

# The kind of fault, and words that its message must have.
EXPECTED = {
    "NO_FIRST_SYNC": ("mbarrier", "unordered with the mbarrier_init by thread 0 of block 1"),
    "NO_INIT_FENCE": ("mbarrier", "no mbarrier_init_fence by thread 0 of block 0"),
    "NO_FULL_WAIT": ("uninitialised", "read of shared 'received'"),
    "NO_FREE_WAIT": (
        "async-hazard",
        "unordered with the read by copies for the mbarrier shared 'full' byte 0 of block",
    ),
    "EARLY_FREE": ("race", "unordered with the read by thread"),
    "NO_PROXY_FENCE": ("proxy", "cluster_send read of shared 'sent' byte 0 of block 1"),
    "OVERRUN": ("out-of-bounds", "past the end of shared 'received' (256 bytes) of block 0"),
    "FAR_OVERRUN": ("out-of-bounds", "cluster_send write of 262160 bytes"),
    "ALIGN": ("misaligned", "expected multiples of 16"),
    "BYTES": ("misaligned", "cluster_send of 248 bytes"),
    "MANY_BYTES": ("deadlock", "of block 1: phase 0 misses 0 of 1 arrivals and 16 bytes"),
    "RANK": ("cluster", "rank 2 in a cluster of 2"),
    "NOT_SHARED": ("bad-address", "is not in shared memory"),
    "NO_LAST_SYNC": ("cluster", "block 0 exits, unordered with the cluster_send by copies"),
    "SEND_AT_EXIT": ("cluster", "block 0 exits, unordered with the cluster_send"),
}


def launch(bug=None, run=None, leg="source", cluster=2, clusters=1):
    defines = {"CLUSTER": cluster} | ({f"BUG_{bug}": 1} if bug else {})
    kernel = Kernel(SOURCE, "planted", defines, sm=90, leg=leg)
    blocks = cluster * clusters
    x = np.random.default_rng(0).standard_normal((blocks, ROUNDS, 64), np.float32)
    y, ranks = empty((blocks, 64), np.float32, "y"), empty(blocks, np.int32, "ranks")
    kernel.launch(blocks, 64, SHARED, [copy_in(x, "x"), y, ranks, np.int32(ROUNDS)], run or Run())
    return x, y, ranks


def check(x, y, ranks, cluster):
    assert np.array_equal(ranks, np.arange(len(x)) % cluster)
    rings = np.roll(x.reshape(-1, cluster, ROUNDS, 64), 1, axis=1)
    assert np.allclose(y, rings.sum(2).reshape(y.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random"])
@pytest.mark.parametrize("completion", ["late", "early", "either"])
@pytest.mark.parametrize("preempt", [0, 10])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_the_right_kernel_has_no_findings(schedule, completion, preempt, leg):
    for seed in range(3 if schedule == "random" else 1):
        check(*launch(run=Run(schedule, completion, preempt, seed), leg=leg, clusters=2), 2)


@pytest.mark.parametrize("cluster", [1, 4, 8])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_other_sizes_of_clusters(cluster, leg):
    check(*launch(leg=leg, cluster=cluster, clusters=2), cluster)


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_sizes_that_the_emulator_does_not_have(leg):
    with pytest.raises(RuntimeError, match=r"CLUSTERS_OF_3_1_1|\.reqnctapercluster 3, 1, 1"):
        launch(leg=leg, cluster=3)


def test_a_grid_that_is_no_multiple_of_the_cluster():
    kernel = Kernel(SOURCE, "planted", {"CLUSTER": 2}, sm=90)
    x = empty((3, ROUNDS, 64), np.float32)
    with pytest.raises(EmulatorFault, match="bad-launch: 3 blocks in clusters of 2"):
        kernel.launch(3, 64, SHARED, [x, x, x, np.int32(ROUNDS)])


@pytest.mark.parametrize("bug", EXPECTED)
def test_planted_bug_is_found_and_located(bug):
    check_located(lambda: launch(bug), EXPECTED[bug], SOURCE, bug)


@pytest.mark.parametrize("bug", EXPECTED)
def test_planted_bug_is_found_in_compiled_code(bug):
    check_kind(lambda: launch(bug, leg="ptx"), EXPECTED[bug][0])


@pytest.mark.parametrize("completion", ["late", "early"])
@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_a_copy_that_has_come_is_not_known_to_have_come(leg, completion):
    check_kind(lambda: launch("NO_FULL_WAIT", Run("descending", completion), leg), "async-hazard")


@pytest.mark.parametrize(
    "bug",
    ["NO_FIRST_SYNC", "NO_LAST_SYNC", "NO_FULL_WAIT", "NO_FREE_WAIT", "EARLY_FREE", "SEND_AT_EXIT"],
)
def test_planted_bug_is_found_in_any_order_of_events(bug):
    kinds = ("mbarrier", "cluster", "async-hazard", "race", "uninitialised")
    for seed in range(8):
        run = Run(schedule="random", completion="either", preempt=10, seed=seed)
        check_kind(partial(launch, bug, run), *kinds)


# Mistakes in hopper_device.cuh that every compiler accepts, and what is said of them.
ARRIVE, WAIT = "barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;"
SYNC = f"{ARRIVE} {WAIT}"
WRONG_TEXT = {
    "arrives alone": (SYNC, ARRIVE, "mbarrier: unordered with the mbarrier_init"),
    "arrives twice": (SYNC, f"{ARRIVE} {ARRIVE} {WAIT}", "cluster: arrived twice"),
    "waits alone": (SYNC, WAIT, "cluster: waits and has not arrived"),
    "a copy for a barrier of another block": (
        '"r"(bytes), "r"(cluster_address(barrier, rank))',
        '"r"(bytes), "r"(shared_address(barrier))',
        "cluster: .*barrier",
    ),
}


@pytest.mark.parametrize("mistake", WRONG_TEXT)
def test_wrong_inline_ptx_is_seen(tmp_path, monkeypatch, mistake):
    right, wrong, words = WRONG_TEXT[mistake]
    plant_in_primitives(monkeypatch, tmp_path, right, wrong)
    with pytest.raises(EmulatorFault, match=words):
        launch(leg="ptx")
