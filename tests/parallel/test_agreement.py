"""Calls that do not fit together are the same named error on every rank, and nobody waits."""

import gc
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupy_delta import parallel
from cupy_delta.parallel import agreement, calls


def arrays(T=4, H=1, K=3, V=2, dtype=np.float64):
    x = np.ones((1, T, H, K), dtype)
    return {"q": x, "k": x, "v": np.ones((1, T, H, V), dtype), "beta": np.ones((1, T, H), dtype)}


def on_ranks(*calls, function=parallel.chunk_delta_rule, timeout=20.0):
    """Return the error of each rank, which makes the call of its place."""

    def call(communicator):
        with pytest.raises(Exception) as caught:
            function(communicator, **calls[communicator.rank])
        return caught.type, str(caught.value)

    return parallel.in_threads(len(calls), call, timeout)


STATE = np.ones((1, 1, 3, 2))
SPOILT = {
    "K": (arrays(K=4), ValueError, "K: {}, got 3 on rank 0 and 4 on rank 2"),
    "heads": (arrays(H=2), ValueError, "H: {}, got 1 on rank 0 and 2 on rank 2"),
    "dtype": (
        arrays(dtype=np.float32),
        TypeError,
        "dtype of q, k and v: {}, got float64 on rank 0 and float32 on rank 2",
    ),
    "beta": (
        arrays() | {"beta": np.ones((1, 4, 1), np.float32)},
        TypeError,
        "dtype of beta: {}, got float64 on rank 0 and float32 on rank 2",
    ),
    "gate": (
        arrays() | {"g": np.zeros((1, 4, 1))},
        TypeError,
        "dtype of g: {}, got None on rank 0 and float64 on rank 2",
    ),
    "state": (
        arrays() | {"initial_state": STATE},
        ValueError,
        "initial_state given: {}, got False on rank 0 and True on rank 2",
    ),
    "scale": (arrays() | {"scale": 2.0}, ValueError, None),
    "layout": (
        arrays() | {"state_layout": "vk"},
        ValueError,
        "state_layout: {}, got kv on rank 0 and vk on rank 2",
    ),
    "sequences": (arrays() | {"cu_seqlens": np.array([0, 12])}, ValueError, None),
    "states_on": (
        arrays() | {"states_on": "all"},
        ValueError,
        "states_on: {}, got ends on rank 0 and all on rank 2",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("function", [parallel.chunk_delta_rule, parallel.chunk_delta_rule_fwd])
def test_what_differs_is_named_on_every_rank(what, function):
    other, error, text = SPOILT[what]
    errors = on_ranks(arrays(), arrays(), other, function=function)
    assert errors == [errors[0]] * 3
    assert errors[0][0] is error
    assert "expected the same on every rank" in errors[0][1]
    if text is not None:
        assert errors[0][1] == text.format("expected the same on every rank")


def test_a_wrong_argument_is_an_error_on_every_rank():
    wrong = arrays() | {"beta": np.ones((1, 4, 2))}
    own, *others = on_ranks(wrong, arrays(), arrays())
    assert own == (ValueError, "beta: expected (B, T, HV) = (1, 4, 1) like v, got (1, 4, 2)")
    assert others == [(own[0], f"rank 0: {own[1]}")] * 2


def test_a_gate_that_grows_is_an_error_on_every_rank():
    errors = on_ranks(arrays() | {"g": np.zeros((1, 4, 1))}, arrays() | {"g": np.ones((1, 4, 1))})
    assert all(error is ValueError and "expected log decays" in text for error, text in errors)


def test_a_long_text_of_many_bytes_travels():
    wrong = arrays() | {"states_on": "ä" * 3000}
    _, (error, text) = on_ranks(wrong, arrays())
    assert error is ValueError
    assert text.startswith("rank 0: states_on: expected")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": np.array([0, 7])}, "0 to the tokens of all ranks, 8, got [0 7]"),
        ({"cu_seqlens": np.array([0, 9, 8])}, "0 to the tokens of all ranks, 8, got [0 9 8]"),
        ({"tokens": [4]}, "expected a number of at least 0 for each of 2 ranks, got [4]"),
        ({"tokens": [5, 4]}, "tokens: expected T = 4 for rank 0, got 5"),
        ({"states_on": "last"}, 'states_on: expected "ends" or "all", got \'last\''),
        ({"initial_state": np.ones((2, 1, 3, 2))}, "initial_state: expected"),
    ],
)
def test_values_that_fit_no_cut(options, message):
    errors = on_ranks(arrays() | options, arrays() | options)
    assert all(error is ValueError and message in text for error, text in errors)


@pytest.mark.parametrize("costly", [False, True])
@pytest.mark.parametrize("tokens", [6, "44", [4.0, 4.0], (4 for _ in range(2))])
def test_tokens_that_are_no_integers(monkeypatch, tokens, costly):
    monkeypatch.setattr(calls, "_agrees_at_no_cost", lambda x: not costly)
    own, other = on_ranks(arrays() | {"tokens": tokens}, arrays() | {"tokens": [4, 4]})
    assert own == (TypeError, f"tokens: expected integers, one per rank, got {tokens!r}")
    assert other == (TypeError, f"rank 0: {own[1]}")


@pytest.mark.parametrize("costly", [False, True])
@pytest.mark.parametrize("wrong", [{"scale": [2.0]}, {"states_on": ["all"]}, {"chunk_size": {}}])
def test_options_without_a_hash(monkeypatch, wrong, costly):
    monkeypatch.setattr(calls, "_agrees_at_no_cost", lambda x: not costly)
    right = arrays() | {"tokens": [4, 4]}
    own, other = on_ranks(right | wrong, right)
    assert own[1].startswith(f"{next(iter(wrong))}: expected ")
    assert other == (own[0], f"rank 0: {own[1]}")


@pytest.mark.parametrize("costly", [False, True])
@pytest.mark.parametrize("tokens", [[4, 2**63], [4, 2**63 - 4], [4, 10**40]])
def test_more_tokens_than_64_bits_count(monkeypatch, tokens, costly):
    monkeypatch.setattr(calls, "_agrees_at_no_cost", lambda x: not costly)
    own, other = on_ranks(arrays() | {"tokens": tokens}, arrays() | {"tokens": [4, 4]})
    assert own == (ValueError, f"tokens: expected at most {2**63 - 1} in all, got {tokens}")
    assert other == (ValueError, f"rank 0: {own[1]}")


@pytest.mark.parametrize("function", [parallel.chunk_delta_rule, parallel.chunk_delta_rule_fwd])
def test_a_communicator_that_is_none(function):
    with pytest.raises(TypeError, match=r"^communicator: expected an object with .*got NoneType$"):
        function(None, **arrays())


def test_a_wrong_gradient_is_an_error_on_every_rank():
    def call(communicator):
        o, _, residuals = parallel.chunk_delta_rule_fwd(communicator, **arrays())
        do = o.astype(np.float32) if communicator.rank == 1 else o
        with pytest.raises(TypeError) as caught:
            parallel.chunk_delta_rule_bwd(residuals, do)
        return str(caught.value)

    other, own = parallel.in_threads(2, call, 20)
    assert own == "do: expected dtype float64 like v, got float32"
    assert other == f"rank 1: {own}"


def test_residuals_of_another_function_are_refused():
    with pytest.raises(TypeError, match=r"^residuals: expected those of parallel\."):
        parallel.chunk_delta_rule_bwd(None, np.ones(1))


# ---- ranks that are gone -------------------------------------------------------------------------


def test_a_rank_that_stays_away_is_named_in_time():
    def call(communicator):
        if communicator.rank == 1:
            return None
        with pytest.raises(TimeoutError) as caught:
            parallel.chunk_delta_rule(communicator, **arrays())
        return str(caught.value)

    texts = parallel.in_threads(3, call, timeout=0.2)
    assert all("all_gather: no answer from rank 1 within 0.2 s" in x for x in texts[::2])


def test_a_rank_that_fails_takes_the_others_along():
    def call(communicator):
        if communicator.rank == 1:
            raise OSError("full")
        parallel.chunk_delta_rule(communicator, **arrays())

    with pytest.raises(OSError, match="full"):
        parallel.in_threads(3, call, timeout=20)


def test_arrays_that_differ_do_not_meet():
    def call(communicator):
        communicator.all_gather(np.zeros(1 + communicator.rank))

    with pytest.raises(ValueError, match="expected one shape and dtype on every rank"):
        parallel.in_threads(2, call, timeout=20)


@dataclass
class Plain:
    """A communicator of a caller's own, which has no hash."""

    rank: int
    size: int
    inner: Any

    def all_gather(self, x):
        return self.inner.all_gather(x)

    def shift(self, x, by):
        return self.inner.shift(x, by)


class Bare(NamedTuple):
    """One that has no weak references."""

    rank: int
    size: int
    inner: Any
    all_gather = Plain.all_gather
    shift = Plain.shift


@pytest.mark.parametrize("costly", [False, True])
@pytest.mark.parametrize("kind", [Plain, Bare])
def test_communicators_that_nothing_can_be_kept_by(monkeypatch, kind, costly):
    monkeypatch.setattr(calls, "_agrees_at_no_cost", lambda x: not costly)
    monkeypatch.setattr(agreement, "_agreed", {})

    def call(inner):
        own = kind(inner.rank, inner.size, inner)
        return parallel.chunk_delta_rule(own, **arrays(), tokens=[4, 4]).o.shape

    assert parallel.in_threads(2, call, 20) == [(1, 4, 1, 2)] * 2
    gc.collect()
    assert not agreement._agreed


def test_with_tokens_of_all_ranks_devices_agree_once(monkeypatch):
    """The way of CuPy arrays, on NumPy's."""
    monkeypatch.setattr(calls, "_agrees_at_no_cost", lambda x: False)

    class Counting:
        def __init__(self, inner):
            self.inner, self.rank, self.size, self.notes = inner, inner.rank, inner.size, 0

        def all_gather(self, x):
            self.notes += x.dtype == np.uint8
            return self.inner.all_gather(x)

        def shift(self, x, by):
            return self.inner.shift(x, by)

    def call(communicator):
        counting, seen = Counting(communicator), []
        for T, tokens in ((4, [4, 4]), (4, [4, 4]), (4, None), (3, [3, 3]), (4, [4, 4])):
            parallel.chunk_delta_rule(counting, **arrays(T), tokens=tokens)
            seen.append(counting.notes)
        with pytest.raises(ValueError, match=r"^beta: "):
            parallel.chunk_delta_rule(counting, **arrays() | {"beta": np.ones((1, 4, 2))})
        return seen

    assert parallel.in_threads(2, call, 20) == [[1, 1, 2, 3, 3]] * 2
