"""Cut into any shares, sequences have the outputs, states and gradients that they have whole."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shares import on_one_rank, on_rank, problem, worst

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
