"""Cut into any shares, sequences have the outputs, states and gradients that they have whole."""

import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shares import on_one_rank, on_rank, problem, together, worst

from cupy_delta import parallel
from cupy_delta.parallel import transfers


@st.composite
def cuts(draw):
    """Tokens of each rank, some of them none, and borders of sequences, some of them empty."""
    tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    total = sum(tokens)
    cu_seqlens = None
    if draw(st.booleans()):
        # Borders of ranks are where mistakes are: draw some of them.
        borders = [0, *itertools.accumulate(tokens)]
        place = st.one_of(st.integers(0, total), st.sampled_from(borders))
        cu_seqlens = [0, *sorted(draw(st.lists(place, max_size=4))), total]
    return tokens, cu_seqlens


OPTIONS = st.fixed_dictionaries(
    {
        "gate": st.sampled_from([None, "scalar", "channel"]),
        "initial": st.booleans(),
        "layout": st.sampled_from(["kv", "vk"]),
        "H": st.sampled_from([1, 2]),
        "G": st.sampled_from([1, 2]),
        "B": st.sampled_from([1, 2]),
    }
)
PLAIN = dict(gate=None, initial=True, layout="kv", H=1, G=1, B=1)


@settings(max_examples=60)
@example(([3, 0, 4], [0, 0, 3, 3, 7]), PLAIN, True, True, True, "all")
@example(([2, 2, 2, 2], [0, 1, 7, 8]), PLAIN, True, True, False, "ends")
@example(([0, 0], [0, 0]), PLAIN, True, True, False, "all")
@example(([0, 5], None), PLAIN, True, True, True, "ends")
@given(
    cuts(), OPTIONS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["ends", "all"])
)
def test_a_cut_batch_is_the_whole_one(cut, options, norm, with_dfinal, scans, states_on):
    tokens, cu_seqlens = cut
    if cu_seqlens is not None:
        options = options | {"B": 1}
    args, kwargs, do, dfinal_state = problem(tokens, cu_seqlens=cu_seqlens, K=3, V=4, **options)
    kwargs = kwargs | {"qk_l2norm": norm, "chunk_size": 4}
    dfinal_state = dfinal_state if with_dfinal else None
    expected = on_one_rank(args, kwargs, do, dfinal_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers, "GATHERED", 1 if scans else 16)
        shares = parallel.in_threads(
            len(tokens),
            lambda c: on_rank(c, tokens, args, kwargs, do, dfinal_state, states_on=states_on),
            timeout=30,
        )
    assert worst(shares, expected) < 1e-12
    everywhere = states_on == "all" or len(tokens) == 1
    for alone, _, final_state, _ in shares[:-1]:
        assert (alone.final_state is not None) == (final_state is not None) == everywhere
    for share in shares[1:]:
        assert (share[3].initial_state is not None) == (everywhere and options["initial"])


@pytest.mark.parametrize("gathered", [16, 1])
def test_nan_stays_in_its_sequence(monkeypatch, gathered):
    """Where a sequence begins nothing of the ranks before is multiplied by zero."""
    monkeypatch.setattr(transfers, "GATHERED", gathered)
    tokens, ends = [3] * 7, [0, 7, 17, 21]
    args, kwargs, do, dfinal_state = problem(tokens, cu_seqlens=ends, initial=True)
    spoilt = [x if x is None else x.copy() for x in args]
    spoilt[2][:, 2] = np.nan
    spoilt[2][:, 18] = np.nan

    def run(arguments):
        call = lambda c: on_rank(c, tokens, arguments, kwargs, do, dfinal_state)  # noqa: E731
        shares = parallel.in_threads(7, call, timeout=30)
        _, final_state, o, _, gradients = together(shares)
        return o, final_state, gradients

    middle = slice(7, 17)
    (o, final, gradients), (wanted, wanted_final, wanted_gradients) = run(spoilt), run(args)
    assert np.isnan(o).any() and np.isnan(gradients["k"]).any()
    np.testing.assert_array_equal(o[:, middle], wanted[:, middle])
    np.testing.assert_array_equal(final[1], wanted_final[1])
    for name in ("q", "k", "v", "beta"):
        np.testing.assert_array_equal(gradients[name][:, middle], wanted_gradients[name][:, middle])
    np.testing.assert_array_equal(
        gradients["initial_state"][1], wanted_gradients["initial_state"][1]
    )


@pytest.mark.parametrize("gathered", [16, 1])
def test_bits_do_not_depend_on_who_comes_first(monkeypatch, gathered):
    monkeypatch.setattr(transfers, "GATHERED", gathered)
    tokens = [5, 2, 0, 6, 4]
    whole = problem(tokens, initial=True, gate="scalar")

    class Late:
        """A communicator that takes its time, another one in every call."""

        def __init__(self, communicator, seed):
            self.inner, self.rank, self.size = communicator, communicator.rank, communicator.size
            self.random = random.Random(f"{seed} {self.rank}")

        def all_gather(self, x):
            time.sleep(0.003 * self.random.random())
            return self.inner.all_gather(x)

        def shift(self, x, by):
            time.sleep(0.003 * self.random.random())
            return self.inner.shift(x, by)

    def bits(seed):
        shares = parallel.in_threads(5, lambda c: on_rank(Late(c, seed), tokens, *whole), 30)
        _, final_state, o, _, gradients = together(shares)
        return [x.tobytes() for x in (o, final_state, *gradients.values())]

    assert bits(0) == bits(1) == bits(2)


def test_out_is_written_and_returned():
    tokens = [4, 5]
    args, kwargs, *_ = problem(tokens)

    def call(communicator):
        own = slice(0, 4) if communicator.rank == 0 else slice(4, 9)
        share = [None if x is None else x[:, own] for x in args]
        out = np.full(share[2].shape, np.nan)
        o = parallel.chunk_delta_rule(communicator, *share, **kwargs, out=out).o
        return o is out and not np.isnan(out).any()

    assert parallel.in_threads(2, call, 30) == [True, True]


def test_float32_states_of_16_bit_arrays():
    """What is told has the dtype of states, and outputs the accuracy of one call."""
    tokens = [40, 30, 50]
    whole = problem(tokens, initial=True, dtype=np.float16, H=2)
    exact = [x if x is None else x.astype(np.float64) for x in whole[0]]
    exact_kwargs = whole[1] | {"initial_state": whole[1]["initial_state"].astype(np.float64)}
    exact = exact, exact_kwargs, *(x.astype(np.float64) for x in whole[2:])
    shares = parallel.in_threads(3, lambda c: on_rank(c, tokens, *whole), 30)
    assert shares[2][2].dtype == np.float32
    alone = on_one_rank(*whole)
    as_shares = [(SimpleNamespace(o=alone[0], final_state=alone[1]), *alone[:2], alone[2])]
    assert worst(shares, on_one_rank(*exact)) < 2 * worst(as_shares, on_one_rank(*exact))


@pytest.mark.parametrize("function", [parallel.chunk_delta_rule, parallel.chunk_delta_rule_fwd])
def test_out_over_the_initial_state_is_refused_and_nothing_is_written(function):
    x, beta = np.ones((1, 4, 1, 2)), np.full((1, 4, 1), 0.5)

    def call(communicator):
        memory = np.ones(8)
        out, initial_state = memory.reshape(x.shape), memory[:4].reshape(1, 1, 2, 2)
        with pytest.raises(ValueError, match="out: expected no memory in common with initial_s"):
            function(communicator, x, x, x, beta, out=out, initial_state=initial_state)
        return memory.tolist()

    assert parallel.in_threads(2, call, 30) == [[1.0] * 8] * 2
