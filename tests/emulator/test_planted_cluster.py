"""Clusters: what they exchange, and every planted mistake, as in test_planted_bugs.py."""

import re
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatorFault, Kernel, Run, copy_in, empty

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


def blamed_lines(bug):
    lines = SOURCE.read_text().splitlines()
    return {i for i, text in enumerate(lines, 1) if re.search(rf"// blame .*\b{bug}\b", text)}


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
    kind, words = EXPECTED[bug]
    with pytest.raises(EmulatorFault) as caught:
        launch(bug)
    text = str(caught.value)
    assert caught.value.kind == kind, text
    assert words in text
    named = {int(n) for n in re.findall(r"planted_cluster\.cu:(\d+)", text)}
    assert named & blamed_lines(bug), text


@pytest.mark.parametrize("bug", EXPECTED)
def test_planted_bug_is_found_in_compiled_code(bug):
    with pytest.raises(EmulatorFault) as caught:
        launch(bug, leg="ptx")
    assert caught.value.kind == EXPECTED[bug][0], str(caught.value)


@pytest.mark.parametrize(
    "bug",
    ["NO_FIRST_SYNC", "NO_LAST_SYNC", "NO_FULL_WAIT", "NO_FREE_WAIT", "EARLY_FREE", "SEND_AT_EXIT"],
)
def test_planted_bug_is_found_in_any_order_of_events(bug):
    for seed in range(8):
        run = Run(schedule="random", completion="either", preempt=10, seed=seed)
        with pytest.raises(EmulatorFault) as caught:
            launch(bug, run)
        assert caught.value.kind in ("mbarrier", "cluster", "async-hazard", "race", "uninitialised")
