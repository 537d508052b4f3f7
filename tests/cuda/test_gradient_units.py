"""Gradients of float16 that are small or large: as accurate as those of ordinary size."""

import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta.cuda import plan as plans

ENDS = np.array([0, 0, 40, 70])
OPTIONS = [
    dict(K=16, V=24, cu_seqlens=ENDS),
    dict(K=16, V=24, gate="scalar", decay=0.02),
    dict(K=64, V=64, gate="scalar", decay=0.02, hopper=True),
]
HOPPER = dict(sm=90, sm_count=132, shared_bytes=227 * 1024)
NAMES = ("q", "k", "v", "beta", "initial_state")
FLOAT32 = ("beta", "g", "initial_state")


@pytest.fixture(params=OPTIONS, ids=["portable, sequences", "portable, gate", "sm90, gate"])
def call(request, emulated):
    """The backward of a call, from gradients that are about 1 times some size."""
    sizes = dict(request.param)
    if sizes.pop("hopper", False):
        emulated(**HOPPER)
    args, kw = make_inputs(70, H=2, G=2, initial=True, dtype=np.float16, **sizes)
    args[3:] = (None if x is None else x.astype(np.float32) for x in args[3:])
    rng = np.random.default_rng(1)
    do = rng.standard_normal(args[2].shape)
    dfinal = rng.standard_normal(kw["initial_state"].shape)

    def backward(do_size, dfinal_size, do=do, dfinal=dfinal, **more):
        forward = cd.chunk_delta_rule_fwd(*args, **kw, **more)
        given = (do * do_size).astype(np.float16), (dfinal * dfinal_size).astype(np.float32)
        return cd.chunk_delta_rule_bwd(forward.residuals, *given)

    backward.do, backward.dfinal = do, dfinal
    return backward


def error(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.ptx_leg(exponent=[-25, 20])
@pytest.mark.parametrize("exponent", [-60, -25, -17, -14, 13, 20, 60])
def test_of_the_final_states_alone(call, on_reference, exponent):
    """Then the gradients that are float32 have their digits at any size."""
    got = call(0, 2.0**exponent)
    expected = on_reference(call, 0, 2.0**exponent)
    for name in FLOAT32:
        if getattr(got, name) is not None:
            assert error(getattr(got, name), getattr(expected, name)) < 3e-3, name
    assert not np.any(got.q)


@pytest.mark.parametrize("exponent", [-17, -14, 12])
def test_of_the_outputs_alone(call, on_reference, exponent):
    got, expected = call(2.0**exponent, 0), on_reference(call, 2.0**exponent, 0)
    for name in NAMES:
        x, y = getattr(got, name), getattr(expected, name)
        rounding = 0 if x.dtype == np.float32 else 2.0**-25 * x.size**0.5 / np.linalg.norm(y)
        assert error(x, y) < 3e-3 + 2 * rounding, name


def test_of_large_final_states_beside_ordinary_outputs(call, on_reference):
    """The gradient of q comes from the outputs alone and keeps its digits."""
    got, expected = call(1, 2.0**20), on_reference(call, 1, 2.0**20)
    for name in ("q", "beta", "initial_state"):
        assert error(getattr(got, name), getattr(expected, name)) < 3e-3, name


def test_a_power_of_two_changes_no_bit(call):
    """Of gradients whose size is from 1 to 2, small or not: units are exact."""
    given = dict(do=np.clip(np.round(call.do * 4) / 4, -1.75, 1.75))
    given["dfinal"] = np.clip(call.dfinal, -1.9, 1.9)
    ordinary, small = call(1, 1, **given), call(2.0**-8, 2.0**-8, **given)
    for name in FLOAT32:
        if (x := getattr(ordinary, name)) is not None:
            assert np.array_equal(x * 2.0**-8, getattr(small, name)), name


def test_ordinary_gradients_are_in_no_unit(call, monkeypatch):
    in_units, left_out = call(1, 1), []
    monkeypatch.setattr(plans, "in_units", lambda plan, _: left_out.append(plan) or plan)
    monkeypatch.setattr(plans, "plan", plans.made)  # not the plan that was kept
    without = call(1, 1)
    assert left_out
    for x, y in zip(in_units, without, strict=True):
        assert (x is None and y is None) or np.array_equal(x, y)


def test_heads_have_their_own_units(call, on_reference):
    """A key head with its value heads: small ones beside ordinary ones, and beside NaN."""
    do, dfinal = call.do.copy(), call.dfinal.copy()
    do[:, :, 2:], dfinal[:, 2:] = do[:, :, 2:] * 2.0**-9, dfinal[:, 2:] * 2.0**-30
    alone = call(1, 1, do=do, dfinal=dfinal)
    do[:, 3:5, 0], dfinal[:, 1] = np.nan, np.inf
    beside = call(1, 1, do=do, dfinal=dfinal)
    expected = on_reference(call, 1, 1, do=do, dfinal=dfinal)
    for name, small in (("beta", np.s_[:, :, 2:]), ("initial_state", np.s_[:, 2:])):
        x, y, z = (getattr(r, name)[small] for r in (beside, alone, expected))
        assert np.array_equal(x, y), name
        assert error(x, z) < 3e-3, name


def test_an_empty_sequence_passes_on_every_bit(emulated):
    args, kw = make_inputs(0, B=2, H=2, K=16, V=24, initial=True, dtype=np.float16)
    forward = cd.chunk_delta_rule_fwd(*args, **kw)
    for size in (2.0**-100, 1, 2.0**100):
        dfinal = kw["initial_state"] * np.float32(size)
        got = cd.chunk_delta_rule_bwd(forward.residuals, args[2], dfinal)
        assert np.array_equal(got.initial_state, dfinal)
