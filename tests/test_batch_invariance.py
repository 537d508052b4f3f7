"""On NumPy arrays what else is in the batch changes no bit of a sequence's results."""

import itertools

import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd

GATES = [None, "scalar", "channel"]
DTYPES = [np.float64, np.float32]


def same(x, y):
    return np.array_equal(x.view(np.uint8), y.view(np.uint8))


def row(args, b):
    return [None if x is None else x[b : b + 1] for x in args]


@pytest.mark.parametrize("operator", [cd.chunk_delta_rule, cd.recurrent_delta_rule])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 40])
def test_a_row_alone_and_among_others(operator, gate, dtype, D):
    args, kw = make_inputs(150, B=5, H=3, G=2, K=D, V=D, gate=gate, dtype=dtype, initial=True)
    together = operator(*args, **kw)
    for b in (0, 2, 4):
        alone = operator(*row(args, b), **kw | {"initial_state": kw["initial_state"][b : b + 1]})
        assert same(alone.o[0], together.o[b])
        assert same(alone.final_state[0], together.final_state[b])


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_a_row_alone_and_among_others(gate):
    args, kw = make_inputs(100, B=3, H=2, G=2, K=16, V=16, gate=gate, dtype=np.float32)
    forward = cd.chunk_delta_rule_fwd(*args, **kw)
    together = cd.chunk_delta_rule_bwd(forward.residuals, np.ones_like(forward.o))
    forward = cd.chunk_delta_rule_fwd(*row(args, 1), **kw)
    alone = cd.chunk_delta_rule_bwd(forward.residuals, np.ones_like(forward.o))
    for x, y in zip(alone, together, strict=True):
        assert (x is None and y is None) or same(x[0], y[1])


@pytest.mark.parametrize("gate", GATES)
def test_a_sequence_alone_and_end_to_end_with_others(gate):
    cu = [0, 0, 1, 70, 150]
    args, kw = make_inputs(150, H=3, G=2, K=16, V=16, gate=gate, dtype=np.float32, cu_seqlens=cu)
    together = cd.chunk_delta_rule(*args, **kw)
    for n, (start, stop) in enumerate(itertools.pairwise(cu)):
        some = [None if x is None else x[:, start:stop] for x in args]
        alone = cd.chunk_delta_rule(*some, **kw | {"cu_seqlens": None})
        assert same(alone.o[0], together.o[0, start:stop])
        assert same(alone.final_state[0], together.final_state[n])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", [64, 128, 320])
def test_a_sequence_cut_at_a_chunk_and_taken_up(gate, cut):
    args, kw = make_inputs(400, H=2, G=2, K=16, V=16, gate=gate, dtype=np.float32)
    whole = cd.chunk_delta_rule(*args, **kw)
    parts = [[None if x is None else x[:, i] for x in args] for i in np.s_[:cut, cut:]]
    first = cd.chunk_delta_rule(*parts[0], **kw)
    rest = cd.chunk_delta_rule(*parts[1], **kw | {"initial_state": first.final_state})
    assert same(np.concatenate([first.o, rest.o], axis=1), whole.o)
    assert same(rest.final_state, whole.final_state)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("D", [16, 128])
def test_a_step_alone_and_among_others(gate, dtype, T, D):
    args, kw = make_inputs(T, B=9, H=2, G=2, K=D, V=D, gate=gate, dtype=dtype, initial=True)
    pool = kw["initial_state"].copy()
    o = cd.delta_rule_step(*args, state=pool)
    for b in (0, 4, 8):
        state = kw["initial_state"][b : b + 1].copy()
        assert same(cd.delta_rule_step(*row(args, b), state=state)[0], o[b])
        assert same(state[0], pool[b])
