"""On CuPy arrays no bit depends on what else is in the batch, where no sequence is cut up."""

import ml_dtypes
import numpy as np
import pytest
from emulator import HOPPER
from helpers import make_inputs

import cupy_delta as cd

BF16 = np.dtype(ml_dtypes.bfloat16)
# The second with sums fused as on a GPU, since bits of two programs are compared.
LEGS = ["source", "fused"]


def same(x, y):
    return np.array_equal(x.view(np.uint8), y.view(np.uint8))


def row(args, b):
    return [None if x is None else x[b : b + 1] for x in args]


@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_a_row_alone_and_among_others(emulated, operator, facts):
    emulated(**facts)
    args, kw = make_inputs(70, B=3, G=2, K=32, V=96, gate="scalar", dtype=BF16, initial=True)
    together = operator(*args, **kw)
    alone = operator(*row(args, 1), **kw | {"initial_state": kw["initial_state"][1:2]})
    assert same(alone.o[0], together.o[1])
    assert same(alone.final_state[0], together.final_state[1])


@pytest.mark.parametrize("T", [1, 3])
def test_a_step_alone_and_among_others(emulated, T):
    args, kw = make_inputs(T, B=5, G=2, K=32, V=32, gate="scalar", dtype=BF16, initial=True)
    pool, state = kw["initial_state"].copy(), kw["initial_state"][3:4].copy()
    o = cd.delta_rule_step(*args, state=pool)
    assert same(cd.delta_rule_step(*row(args, 3), state=state)[0], o[3])
    assert same(state[0], pool[3])


def test_few_states_in_smaller_tiles(emulated):
    """By products with one tile more or less of value channels, the same sums."""
    args, kw = make_inputs(
        2, B=33, H=2, G=2, K=64, V=64, gate="scalar", dtype=BF16, initial=True, seed=1
    )
    pool, few = (kw["initial_state"][:n].astype(BF16) for n in (33, 3))
    o = cd.delta_rule_step(*args, state=pool)
    tiles = [emulated.devices[-1].launches] if emulated.devices is not None else []
    args = [None if x is None else x[:3] for x in args]
    assert same(cd.delta_rule_step(*args, state=few), o[:3])
    assert same(few, pool[:3])
    if tiles:
        tiles.append(emulated.devices[-1].launches)
        assert [dict(x[0].defines)["TILES"] for x in tiles] == [4, 2]


@pytest.mark.ptx_leg(dtype=["bfloat16"], gate=["scalar"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_one_token_of_few_states_and_of_many(emulated, dtype, layout, gate):
    """With few states it is made early, in smaller tiles of (K, V) states: the same sums."""
    options = dict(K=64, V=32, gate=gate, dtype=np.dtype(dtype), initial=True, layout=layout)
    args, kw = make_inputs(1, B=129, **options)
    many, few = (kw["initial_state"][:n].astype(dtype) for n in (129, 2))
    how = dict(state_layout=layout, qk_l2norm=True)
    o = cd.delta_rule_step(*args, state=many, **how)
    launches = [emulated.devices[-1].launches] if emulated.devices is not None else []
    some = cd.delta_rule_step(*(x[:2] for x in args), state=few, **how)
    assert same(some, o[:2])
    assert same(few, many[:2])
    if launches:
        launches.append(emulated.devices[-1].launches)
        of_many, of_few = (dict(x[0].defines) for x in launches)
        assert of_many != of_few or dtype == "bfloat16"
