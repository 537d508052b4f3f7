"""Steps of several tokens under the emulator: what is accepted, ragged lengths, gates, slots."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import deviation, make_inputs
from raw import raw_gate

import cupy_delta as cd
from cupy_delta.cuda import operators
from cupy_delta.cuda.plan import plan
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.tokens import decode
from cupy_delta.problem import step_problem

BF16, F32, F64 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)
# The second with sums fused as on a GPU, since bits of two programs are compared.
LEGS = ["source", "fused"]
ENDS = np.array([0, 3, 3, 5, 6])
OPTIONS = dict(scale=None, qk_l2norm=False, state_layout="kv", out=None)
READ, WRITTEN, ACCEPTED = np.array([3, 1, -1, 0]), np.array([3, 2, 4, 0]), np.array([2, 0, 1, 0])


def token(args, t):
    return [None if x is None else x[:, t : t + 1] for x in args]


def one_by_one(args, pool, options):
    """Outputs and new slots of that ragged step, made by steps of single tokens."""
    after, outputs = pool.copy(), []
    for n, (start, stop) in enumerate(itertools.pairwise(ENDS)):
        state = pool[READ[n] : READ[n] + 1].copy() if READ[n] >= 0 else None
        for t in range(start, stop):
            if state is None:
                outputs.append(np.zeros_like(args[2][:, :1]))
                continue
            if t - start == ACCEPTED[n]:
                after[WRITTEN[n]] = state[0]
            one = token(args, t)
            outputs.append(cd.delta_rule_step(*one, state=state, **options))
        if state is not None and ACCEPTED[n] == stop - start:
            after[WRITTEN[n]] = state[0]
    return np.concatenate(outputs, axis=1), after


@pytest.mark.ptx_leg(sizes=[(40, 24)])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("sizes", [(40, 24), (128, 12)])
def test_a_ragged_step_is_its_tokens_one_by_one(emulated, layout, gate, sizes):
    """To the bit: outputs, slots that take up what is accepted, and all others.

    Of one token threads read rows for themselves, of several from shared memory. One row is so
    large that its squares overflow.
    """
    sizes = dict(zip("KV", sizes, strict=True)) | dict(H=1, G=2)
    args, _ = make_inputs(6, gate=gate, dtype=F32, layout=layout, **sizes)
    options = dict(state_layout=layout, qk_l2norm=sizes["K"] == 128)
    if options["qk_l2norm"]:
        args[1][0, 1] *= 1e30
    shape = (2, sizes["K"], sizes["V"]) if layout == "kv" else (2, sizes["V"], sizes["K"])
    pool = np.random.default_rng(0).standard_normal((5, *shape)).astype(F32)
    expected, after = one_by_one(args, pool, options)
    slots = dict(state_indices=READ, output_state_indices=WRITTEN, cu_seqlens=ENDS)
    o = cd.delta_rule_step(*args, state=pool, accepted=ACCEPTED, **options, **slots)
    assert np.array_equal(o, expected)
    assert np.array_equal(pool, after)


@pytest.mark.ptx_leg(T=[2])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("T", [1, 2])
def test_gates_per_channel(emulated, on_reference, dtype, layout, T):
    """Channels that forget all of it, hardly, and strongly."""
    options = dict(B=2, H=2, G=2, K=40, V=24, gate="channel", layout=layout, initial=True)
    args, kw = make_inputs(T, dtype=dtype, **options)
    args[4] = args[4].astype(F64 if dtype == F64 else F32)
    args[4][..., ::7], args[4][..., 3::7], args[4][..., 5] = -np.inf, -20, 0
    states = [kw["initial_state"].copy() for _ in range(2)]
    step = dict(state_layout=layout, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=states[0], **step)
    expected = on_reference(cd.delta_rule_step, *args, state=states[1], **step)
    bound = 1e-14 if dtype == F64 else 1e-6
    assert deviation(o, expected) < (1e-2 if dtype == BF16 else bound)
    assert deviation(*states) < bound


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("few", [True, False])
def test_one_token_whose_squares_overflow(emulated, on_reference, monkeypatch, dtype, layout, few):
    """k of one sequence, q of another, both of a third: sums of rows are made again."""
    monkeypatch.setattr(decode, "FEW_STATES", decode.FEW_STATES if few else 0)
    sizes = dict(B=4 if few else 5, H=1, K=128, V=64)  # each a plan of its own
    args, kw = make_inputs(1, gate="scalar", dtype=dtype, layout=layout, initial=True, **sizes)
    args[1][[0, 2]] *= dtype.type(1e30)
    args[0][[1, 2]] *= dtype.type(1e30)
    states = [kw["initial_state"].astype(dtype) for _ in range(2)]
    options = dict(state_layout=layout, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=states[0], **options)
    expected = on_reference(cd.delta_rule_step, *args, state=states[1], **options)
    bound = 1e-2 if dtype == BF16 else 1e-6
    assert deviation(o, expected) < bound
    assert deviation(*states) < bound


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_one_token_to_other_slots(emulated, on_reference, dtype, layout):
    """To another slot, to the same, to none, and of padding."""
    args, _ = make_inputs(1, B=4, H=1, G=2, K=40, V=24, gate="scalar", dtype=dtype)
    shape = (6, 2, 40, 24) if layout == "kv" else (6, 2, 24, 40)
    pool = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    slots = dict(
        state_indices=np.array([3, 1, 0, -1]), output_state_indices=np.array([2, 1, -1, 4])
    )
    pools = [pool.copy() for _ in range(2)]
    o = cd.delta_rule_step(*args, state=pools[0], state_layout=layout, **slots)
    expected = on_reference(cd.delta_rule_step, *args, state=pools[1], state_layout=layout, **slots)
    bound = 1e-2 if dtype == BF16 else 1e-6
    assert deviation(o, expected) < bound and deviation(*pools) < bound
    assert np.array_equal(pools[0][[0, 3, 4, 5]], pool[[0, 3, 4, 5]])


@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_verify_and_commit(emulated, layout):
    """Nothing is written with 0 accepted; the same call with what was accepted is the state."""
    args, kw = make_inputs(
        4, B=2, K=40, V=24, gate="scalar", dtype=F32, layout=layout, initial=True
    )
    pool, options = kw["initial_state"].copy(), dict(state_layout=layout, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=pool, accepted=np.zeros(2, np.int32), **options)
    assert np.array_equal(pool, kw["initial_state"])
    again = cd.delta_rule_step(*args, state=pool, accepted=np.array([3, 0], np.int32), **options)
    assert np.array_equal(o, again)
    alone = kw["initial_state"].copy()
    cd.delta_rule_step(*(x[:, :3] for x in args), state=alone, **options)
    assert np.array_equal(pool[0], alone[0])
    assert np.array_equal(pool[1], kw["initial_state"][1])


# In device memory, and what is made of it: 2, 4, 0 and 0 tokens, of which the second sequence's are
# taken up.
WRONG = dict(
    cu_seqlens=[-5, 2, 2**33, 3, 2],
    accepted=[-7, 2**40, 5, 1],
    output_state_indices=[2**32 + 1, 4, -3, 6],
)
RIGHT = dict(
    cu_seqlens=[0, 2, 6, 6, 6], accepted=[0, 4, 0, 0], output_state_indices=[-1, 4, -1, -1]
)


def test_wrong_values_in_device_memory_touch_nothing_else(emulated, request):
    if request.config.getoption("--on-gpu"):
        pytest.skip("only the emulator tells what is outside")
    args, _ = make_inputs(6, H=1, G=2, K=40, V=24, gate="scalar", dtype=F32)
    pool = np.random.default_rng(0).standard_normal((6, 2, 40, 24)).astype(F32)
    right = {name: np.array(x) for name, x in RIGHT.items()} | {"state_indices": np.arange(4)}
    expected = pool.copy()
    o = cd.delta_rule_step(*args, state=expected, **right)
    problem = step_problem(*args, state=pool, **right, **OPTIONS)
    with operators.device_of(args[0]) as device:
        ready = {n: device.bring(np.array(x), n, np.int64) for n, x in WRONG.items()}
        found = plan("step", problem, device.facts)
        results = execute(found, vars(problem), device, {"state": pool}, ready)
    assert np.array_equal(results["o"], o)
    assert np.array_equal(pool, expected)


RAW = [
    ("softplus", "scalar", "head", BF16, "kv"),
    ("sigmoid", "channel", "channel", BF16, "vk"),
    ("softplus", "channel", "head", F32, "kv"),
    ("sigmoid", "scalar", None, F64, "vk"),
]


@pytest.mark.parametrize(("formula", "gate", "bias", "dtype", "layout"), RAW)
def test_raw_gates_and_strengths_in_one_launch(
    emulated, on_reference, formula, gate, bias, dtype, layout
):
    args, kw = make_inputs(2, B=2, H=2, G=2, K=40, V=24, dtype=dtype, layout=layout, initial=True)
    rng = np.random.default_rng(0)
    args[3] = cd.SigmoidBeta(rng.standard_normal((2, 2, 4)).astype(dtype), scale=2)
    args[4] = raw_gate(rng, formula, gate, bias, 2, 2, 4, 40, dtype)
    states = [kw["initial_state"].copy() for _ in range(2)]
    options = dict(state_layout=layout, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=states[0], **options)
    if emulated.devices is not None:
        assert [launch.entry for launch in emulated.devices[-1].launches] == ["decode"]
    expected = on_reference(cd.delta_rule_step, *args, state=states[1], **options)
    bound = 1e-14 if dtype == F64 else 1e-6
    assert deviation(o, expected) < (1e-2 if dtype == BF16 else bound)
    assert deviation(*states) < bound


def test_slots_of_pages_with_room_for_few_bytes_at_a_time(emulated, on_reference):
    """Slots an odd number of elements apart: accesses of one element, and nothing in between."""
    args, kw = make_inputs(2, B=2, K=8, V=4, gate="scalar", dtype=F32, layout="vk", initial=True)
    pages = np.full((4, 37), np.nan, F32)
    pool = np.lib.stride_tricks.as_strided(pages[:, 1:], (4, 1, 4, 8), (148, 128, 32, 4))
    pool[[3, 0]] = kw["initial_state"]
    whole, expected = pages.copy(), kw["initial_state"].copy()
    slots = np.array([3, 0])
    o = cd.delta_rule_step(*args, state=pool, state_indices=slots, state_layout="vk")
    alone = on_reference(cd.delta_rule_step, *args, state=expected, state_layout="vk")
    assert deviation(o, alone) < 1e-6
    assert deviation(pool[slots], expected) < 1e-6
    whole[[3, 0], 1:33] = pages[[3, 0], 1:33]
    assert np.array_equal(pages, whole, equal_nan=True)


@pytest.mark.ptx_leg(sizes=[(128, 64)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("sizes", [(128, 64), (40, 24)])
def test_few_states_have_the_same_bits(emulated, monkeypatch, dtype, logits, sizes):
    """As in a batch of many, although their tiles are smaller."""
    options = dict(B=2, H=1, G=2, K=sizes[0], V=sizes[1], initial=True)
    args, kw = make_inputs(1, gate="scalar", dtype=dtype, **options)
    if logits:
        args[3] = cd.SigmoidBeta(args[3].astype(dtype))
        args[4] = cd.SoftplusGate(args[4].astype(dtype), np.zeros(2, F32))
    results, tiles = [], []
    for few in (0, decode.FEW_STATES):
        monkeypatch.setattr(decode, "FEW_STATES", few)
        pool = np.concatenate([kw["initial_state"]] * (2 if few else 1)).astype(dtype)
        o = cd.delta_rule_step(*args, state=pool, state_indices=np.arange(2), qk_l2norm=True)
        results.append((o.tobytes(), pool[:2].tobytes()))
        if emulated.devices is not None:
            tiles.append(dict(emulated.devices[-1].launches[0].defines)["VALUES"])
    assert results[0] == results[1]
    if tiles and sizes == (128, 64):
        assert tiles[0] == 2 * tiles[1]
