"""Plans and sources: pure Python, no device of any kind."""

import numpy as np
import pytest
from helpers import make_inputs

from cupy_delta.call import Call
from cupy_delta.checker import KEPT_CALLS
from cupy_delta.cuda import plan as plans
from cupy_delta.cuda.runtime import sources
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.tokens.affine import plan_affine
from cupy_delta.cuda.variants import launches_of
from cupy_delta.problem import (
    chunk_output_problem,
    factors_problem,
    operator_problem,
    state_pass_problem,
    step_problem,
)

pytestmark = pytest.mark.fast

H200 = DeviceFacts(sm_count=132, shared_bytes=227 * 1024)
SMALL = DeviceFacts(sm_count=28, shared_bytes=99 * 1024)


def problem(dtype=np.float16, chunk_size=None, qk_l2norm=False, **sizes):
    args, kw = make_inputs(**(dict(T=70, K=64, V=64, dtype=dtype) | sizes))
    options = dict(scale=None, qk_l2norm=qk_l2norm, out=None, chunk_size=chunk_size)
    return operator_problem(*args, **kw, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dtype=np.float64), "float64: the chunked operators on CuPy arrays take float32"),
        (dict(chunk_size=48), "chunk_size = 48: CuPy arrays support 16, 32 and 64, or None"),
        (dict(K=257), "K = 257: CuPy arrays support head sizes up to 256"),
        (dict(V=300), "V = 300: CuPy arrays support head sizes up to 256"),
    ],
)
def test_what_is_not_supported_is_named(options, words):
    with pytest.raises(NotImplementedError, match=words):
        plans.plan("forward", problem(**options), H200)


def test_a_chunk_too_large_for_the_gpu_is_named():
    with pytest.raises(NotImplementedError, match=r"chunk_size = 64: .* this GPU has 101376"):
        plans.plan("forward", problem(K=256, V=256, chunk_size=64), SMALL)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("K", [1, 64, 128, 192, 256])
@pytest.mark.parametrize("V", [1, 64, 128, 256])
@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_every_head_size_fits_every_gpu(dtype, K, V, gate):
    p = problem(dtype=dtype, K=K, V=V, T=1, gate=gate)
    for plan in (plans.plan("training", p, SMALL), plans.plan("backward", p, SMALL)):
        for launch in plan.launches:
            assert 0 <= launch.shared <= SMALL.shared_bytes
            assert launch.block <= 1024 and launch.block % 32 == 0


def slices_of(walk):
    defines = dict(walk.defines)
    return -(-defines["HEAD_V"] // (16 * defines["WARPS"] * defines["ROW_TILES"]))


def test_grids_cover_all_chunks_and_heads():
    p = problem(B=3, T=70, H=2, G=2)
    factors, walk = plans.plan("forward", p, H200).launches
    assert factors.grid == 3 * 3 * 2
    assert walk.grid == 3 * 4 * slices_of(walk)
    v = problem(T=70, cu_seqlens=[0, 10, 10, 70])
    assert plans.plan("forward", v, H200).launches[0].grid == 70 // 32 + 3


def test_nothing_to_do_launches_nothing_that_matters():
    for sizes in (dict(T=0), dict(B=0), dict(T=0, cu_seqlens=[0])):
        p = problem(**sizes)
        factors, walk = plans.plan("forward", p, H200).launches
        assert factors.grid == 0
        assert walk.grid == p.N * p.HV * slices_of(walk)


def test_plans_are_kept_and_hold_no_array():
    first = plans.plan("forward", problem(seed=0), H200)
    assert plans.plan("forward", problem(seed=1), H200) is first
    assert plans.plan("forward", problem(seed=0, T=71), H200) is not first
    assert plans.plan("forward", problem(qk_l2norm=True), H200) is not first
    for launch in first.launches:
        assert all(a is None or isinstance(a, str | np.generic) for a in launch.arguments)


def test_a_call_is_planned_without_arrays():
    sizes = dict(B=1, T=70, N=2, H=2, HV=4, K=64, V=32)
    call = Call(dtype=np.dtype(np.float16), **sizes, gate="scalar", varlen=True, scale=64**-0.5)
    given = problem(T=70, H=2, G=2, K=64, V=32, gate="scalar", cu_seqlens=[0, 10, 70], initial=True)
    for facts in (H200, DeviceFacts(132, 227 * 1024, (9, 0))):
        planned, expected = plans.plan("forward", call, facts), plans.plan("forward", given, facts)
        assert planned.made == expected.made
        assert [vars(x) for x in planned.launches] == [vars(x) for x in expected.launches]


def test_calls_that_are_alike_are_equal_and_problems_are_not():
    sizes = dict(T=8, K=16, V=16, dtype=np.dtype(np.float16))
    assert len({Call(**sizes), Call(**sizes), Call(**sizes, gate="scalar")}) == 2
    one, other = problem(), problem()
    assert one.kept is other.kept
    assert one != other and len({one, other}) == 2


def test_residuals_and_options_change_the_plan():
    names = [
        launch.entry for launch in plans.plan("forward", problem(qk_l2norm=True), H200).launches
    ]
    assert names == ["l2norm", "wy_factors", "forward"]
    assert "states" in plans.plan("training", problem(), H200).workspace
    assert "states" not in plans.plan("forward", problem(), H200).workspace


def test_every_launch_names_arrays_that_exist():
    p = problem(qk_l2norm=True, initial=True)
    given = {"q", "k", "v", "beta", "g", "initial_state", "cu_seqlens", "do", "dfinal_state"}
    forward = plans.plan("training", p, H200)
    backward = plans.plan("backward", p, H200)
    known = given | set(forward.workspace) | set(forward.outputs)
    for plan in (forward, backward):
        known |= set(plan.workspace) | set(plan.outputs)
        for launch in plan.launches:
            assert launch.arrays() <= known


def test_a_plan_says_what_it_reads():
    f32, i64 = np.dtype(np.float32), np.dtype(np.int64)
    p = problem(B=1, cu_seqlens=[0, 70], gate="scalar", initial=True)
    own = dict.fromkeys(("q", "k", "v"))
    read = dict(plans.plan("forward", p, H200).read)
    assert read == own | dict(beta=f32, g=f32, initial_state=f32, cu_seqlens=i64)
    args, kw = make_inputs(2, B=3, dtype=np.float64, initial=True)
    state = dict(state=kw["initial_state"], state_indices=np.arange(3))
    options = dict(scale=None, qk_l2norm=False, state_layout="kv", out=None)
    read = dict(plans.plan("step", step_problem(*args, **state, **options), H200).read)
    assert read["beta"] == np.float64 and read["state_indices"] == i64


def test_the_forward_leaves_what_the_backward_reads():
    p = problem(qk_l2norm=True, initial=True)
    backward = plans.plan("backward", p, H200)
    read = {name for name, _ in backward.read}
    training, names = plans.plan_with_residuals(p, H200)
    assert training is plans.plan("training", p, H200)
    assert {*names} == read - {"do", "dfinal_state"}


def test_plans_in_use_are_kept_however_many_others_there_are():
    p = problem()
    kept = plans.plan("forward", p, H200)
    for T in range(100, 100 + KEPT_CALLS + 5):
        plans.plan("forward", problem(T=T, K=16, V=16), H200)
        assert plans.plan("forward", problem(), H200) is kept


@pytest.mark.parametrize("passes", ["forward", "recurrent"])
def test_too_many_tokens_are_named(passes):
    with pytest.raises(NotImplementedError, match=r"T = 2147483648: CuPy arrays support fewer"):
        launches_of(H200, (passes,), dtype="float32", K=16, V=16, T=2**31)


def test_transfers_of_16_bits_are_named():
    with pytest.raises(NotImplementedError, match="h: transfers of float16 are not supported"):
        plan_affine((1, 1, 4), 4, np.dtype(np.float16), False)


def test_steps_of_sequences_need_the_kernel_of_a_batch_and_that_of_ragged_ones():
    sizes = dict(dtype="float32", K=32, V=32, B=3)
    packed, ragged = launches_of(H200, ("step",), varlen=True, **sizes)
    (batch,) = launches_of(H200, ("step",), **sizes)
    assert (packed.defines, packed.grid) == (batch.defines, batch.grid)
    assert (dict(ragged.defines)["VARLEN"], ragged.grid) == (1, batch.grid)


def test_steps_and_factors_have_plans():
    args, kw = make_inputs(2, B=3, K=40, V=33, initial=True)
    state = dict(state=kw["initial_state"], state_indices=None)
    options = dict(scale=None, qk_l2norm=False, state_layout="kv", out=None)
    (launch,) = plans.plan("step", step_problem(*args, **state, **options), H200).launches
    assert launch.entry == "decode"
    args, _ = make_inputs(50, dtype=np.float32)
    p = factors_problem(*args[1:], qk_l2norm=False, cu_seqlens=None)
    assert [x.entry for x in plans.plan("transfer", p, H200).launches] == ["wy_factors"] + [
        "forward"
    ] * 2


def pieces(gate, qk_l2norm):
    """Operation and call of each building block."""
    (q, k, v, beta, g), _ = make_inputs(50, dtype=np.float32, gate=gate)
    options = dict(qk_l2norm=qk_l2norm, cu_seqlens=None)
    factors = factors_problem(k, v, beta, g, **options)
    yield "wy_factors", factors
    yield "transfer", factors
    options |= dict(chunk_size=16)
    yield "state_pass", state_pass_problem(k, k, v, g, initial_state=None, **options)
    states = np.zeros((1, 4, 1, 5, 7), np.float32)
    yield "chunk_output", chunk_output_problem(q, k, v, states, g, scale=None, **options)


def test_pieces_prepare_keys_and_gates_once():
    names = {
        "wy_factors": "l2norm wy_factors",
        "transfer": "l2norm wy_factors forward forward",
        "state_pass": "l2norm decays forward",
        "chunk_output": "l2norm chunk_output",
    }
    for operation, call in pieces("scalar", qk_l2norm=True):
        launches = plans.plan(operation, call, H200).launches
        assert [x.entry for x in launches] == names[operation].split()


def test_pieces_with_a_gate_per_key_channel_are_given_rows_with_decays():
    names = {
        "wy_factors": "channel_factors",
        "transfer": "channel_factors forward forward",
        "state_pass": "channel_factors forward",
        "chunk_output": "channel_factors chunk_output",
    }
    for operation, call in pieces("channel", qk_l2norm=False):
        launches = plans.plan(operation, call, H200).launches
        assert [x.entry for x in launches] == names[operation].split()


def test_digest_changes_with_any_header(tmp_path):
    (tmp_path / "primitives").mkdir()
    header = tmp_path / "primitives" / "primitives.cuh"
    header.write_text("int a;")
    (tmp_path / "k.cu").write_text('#include "primitives/primitives.cuh"')
    before = sources.variant_source("k.cu", (("A", 1),), tmp_path)
    assert before.endswith('#define A 1\n#include "k.cu"\n')
    header.write_text("int b;")
    sources.digest.cache_clear()
    assert sources.variant_source("k.cu", (("A", 1),), tmp_path) != before


def test_kernels_are_found():
    folder = sources.kernel_folder()
    assert (folder / "portable/forward.cu").is_file()
    assert sources.digest(folder) == sources.digest(folder)
