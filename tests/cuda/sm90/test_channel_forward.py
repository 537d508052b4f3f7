"""The forward with a gate per key channel in one kernel, on compute capability 9.0."""

from dataclasses import replace

import numpy as np
import pytest
from channel_calls import BF16, F16, call_of, check, make_case, same
from channels import patterns
from emulator import HOPPER, EmulatorDevice, Run, copy_in
from helpers import definition
from rounded import wide

from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.call import Call
from cupy_delta.cuda.plan import made
from cupy_delta.cuda.runtime.execute import execute
from cupy_delta.cuda.sm90.channel_whole import plan_whole
from cupy_delta.cuda.spec import DeviceFacts

LEGS = ["source", "ptx"]
H200 = DeviceFacts(132, 227 * 1024, (9, 0))


def computed(args, kw, leg, run=None, **options):
    call = call_of(args, kw, **options)
    given = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    given["initial_state"] = kw["initial_state"]
    given = {name: None if x is None else copy_in(x, name) for name, x in given.items()}
    results = execute(plan_whole(call), given, EmulatorDevice(run or Run(), leg=leg, **HOPPER))
    return np.array(results["o"]), np.array(results["final_state"])


@pytest.mark.parametrize(
    ("sizes", "leg"),
    [
        (dict(T=1), "source"),
        (dict(T=63, K=72, V=104, layout="vk"), "source"),
        (dict(T=64, initial=False), "source"),
        (dict(T=65, B=2, H=2, G=2, layout="vk"), "source"),
        (dict(T=330, G=3, correlation=0.5), "source"),
        (dict(T=200, B=2), "ptx"),
        (dict(T=63, K=72, V=104, layout="vk"), "ptx"),
        (dict(T=1, dtype=F16), "source"),
        (dict(T=130, K=72, V=104, dtype=F16, G=2, layout="vk"), "source"),
        (dict(T=200, dtype=F16, correlation=0.5), "ptx"),
    ],
)
def test_sizes(sizes, leg):
    args, kw = make_case(**sizes)
    check(args, kw, computed(args, kw, leg))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gates_of_every_strength(dtype):
    found = patterns(200, 128)
    args, kw = make_case(200, H=len(found), dtype=dtype)
    args[4] = np.stack([*found.values()], axis=1)[None].astype(np.float32)
    check(args, kw, computed(args, kw, "source"))


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_single_tokens_out_of_range(leg, dtype):
    """Each block of a chunk, by itself, has tokens that are multiplied one by one."""
    args, kw = make_case(128, H=4, decay=0.05, dtype=dtype)
    for block in range(4):
        args[4][:, 16 * block + 5, block, 32 * block + 17 :: 7] = -88
        args[4][:, 64 + 16 * block + 11 :, block, block::9] = -np.inf
    check(args, kw, computed(args, kw, leg))


def test_normalised_rows():
    args, kw = make_case(100)
    longer = [(3 * x.astype(np.float32)).astype(BF16) for x in args[:2]]
    results = computed([*longer, *args[2:]], kw, "source", qk_l2norm=True)
    check(args, kw, results)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_tf32_leaves_out_is_made_up_for(dtype):
    """Pairs of a block of 16 tokens are as large as they should be, on average."""
    args, kw = make_case(16, H=16, beta=(0, 1), initial=False, dtype=dtype)
    o = computed(args, kw, "source")[0].astype(np.float64)
    more, options = wide(args, kw)
    exact = definition(*more, **options)[0]
    assert abs((o * exact).sum() / (exact * exact).sum() - 1) < 2e-4


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order(seed):
    args, kw = make_case(330)
    run = Run(schedule="random", completion="either", preempt=30, seed=seed)
    for x, y in zip(computed(args, kw, "source", run), computed(args, kw, "source"), strict=True):
        assert same(x, y)


def test_a_row_alone_and_among_others():
    args, kw = make_case(100, B=3, G=2)
    o, state = computed(args, kw, "source")
    alone = [x[1:2] for x in args]
    row = computed(alone, kw | dict(initial_state=kw["initial_state"][1:2]), "source")
    assert same(row[0][0], o[1])
    assert same(row[1][0], state[1])


@pytest.mark.parametrize(("later", "first"), [(-5.0, 32), (-40.0, 57), (-np.inf, 21)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_no_bit_depends_on_a_later_gate(later, first, dtype):
    args, kw = make_case(64, decay=0.4, dtype=dtype)
    before, _ = computed(args, kw, "source")
    args[4][:, first:] = later
    after, _ = computed(args, kw, "source")
    assert same(before[:, :first], after[:, :first])
    assert not same(before[:, first:], after[:, first:])


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g"])
def test_nan_stays_in_its_head_and_in_later_chunks(name):
    args, kw = make_case(200, B=2, G=2)
    o, state = computed(args, kw, "source")
    x = args[["q", "k", "v", "beta", "g"].index(name)]
    x[0, 70, 0] = np.nan
    found, left = computed(args, kw, "source")
    assert same(found[1], o[1])
    assert same(left[1], state[1])
    assert same(found[0, :64], o[0, :64])
    assert np.isnan(found[0, 70, 0].astype(np.float32)).all()
    if name not in "qk":
        assert same(found[0, :, 1], o[0, :, 1])


def test_which_calls_take_one_kernel():
    """Where sequences and heads fill the multiprocessors."""
    call = Call(dtype=BF16, B=4, T=8192, N=4, H=32, HV=32, K=128, V=128, gate="channel")
    others = [
        dict(B=1, N=1),
        dict(B=2, N=2),
        dict(K=64),
        dict(V=64),
        dict(dtype=FLOAT_DTYPES["float16"], B=3, N=3),
        dict(B=1, T=32768, varlen=True),
    ]

    def files(call):
        return [x.file.split("/")[-1] for x in made("forward", call, H200).launches]

    assert files(call) == ["channel_forward.cu"]
    assert files(replace(call, B=1, N=1, H=128, HV=128)) == ["channel_forward.cu"]
    assert files(replace(call, qk_l2norm=True))[1:] == ["channel_forward.cu"]
    assert files(replace(call, dtype=FLOAT_DTYPES["float16"])) == ["channel_forward.cu"]
    for options in others:
        assert "channel_factors.cu" in files(replace(call, **options)), options
