"""Wrong and right slots of a pool, and steps of several tokens; one row, one mistake."""

import numpy as np
import pytest
from calls import call, good, integers, refuse

from cupy_delta.problem import MAX_STEP_TOKENS

INDICES = {
    "list": ([0, 1], TypeError, "state_indices: expected an integer array, got list"),
    "float": (
        np.array([0.0, 1.0]),
        TypeError,
        "state_indices: expected dtype int32 or int64, got float64",
    ),
    "mask": (
        np.array([True, False]),
        TypeError,
        "state_indices: expected dtype int32 or int64, got bool",
    ),
    "unsigned": (
        integers(0, 1, dtype=np.uint64),
        TypeError,
        "state_indices: expected dtype int32 or int64, got uint64",
    ),
    "one short": (
        integers(0),
        ValueError,
        "state_indices: expected (B,) = (2,) like q, got (1,)",
    ),
    "one long": (
        integers(0, 1, 2),
        ValueError,
        "state_indices: expected (B,) = (2,) like q, got (3,)",
    ),
    "2-d": (
        integers([0], [1]),
        ValueError,
        "state_indices: expected (B,) = (2,) like q, got (2, 1)",
    ),
    "0-d": (np.array(0), ValueError, "state_indices: expected (B,) = (2,) like q, got ()"),
    "just past the pool": (
        integers(0, 7),
        ValueError,
        "state_indices: expected indices below slots = 7 (negative: padding), got 7",
    ),
    "far past the pool": (
        integers(2**40, -1),
        ValueError,
        "state_indices: expected indices below slots = 7 (negative: padding), got 1099511627776",
    ),
    "repeated": (
        integers(4, 4, dtype=np.int32),
        ValueError,
        "state_indices: expected each slot at most once, got slot 4 repeatedly",
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_wrong_state_indices(name):
    indices, error, message = INDICES[name]
    arguments = good("delta_rule_step", slots=7) | {"state_indices": indices}
    refuse("delta_rule_step", arguments, error, message)


# Of a step of four sequences (3, 0, 2 and 1 tokens) on a pool of six slots.
RAGGED = dict(cu_seqlens=integers(0, 3, 3, 5, 6), state_indices=integers(4, 1, 0, 2))
STEPS = {
    "a long sequence": (
        dict(T=40, cu_seqlens=integers(0, 33, 36, 40, 40)),
        "cu_seqlens: expected at most 32 new tokens per sequence, got 33;"
        " chunk_delta_rule takes any number",
    ),
    "one index for each batch row": (
        dict(state_indices=integers(1)),
        "state_indices: expected (N,) = (4,) like cu_seqlens, got (1,)",
    ),
    "one count for all": (
        dict(accepted=integers(1)),
        "accepted: expected (N,) = (4,) like cu_seqlens, got (1,)",
    ),
    "fewer than none accepted": (
        dict(accepted=integers(3, 0, -1, 0)),
        "accepted: expected 0 to 2 of the tokens of sequence 2, got -1",
    ),
    "more than all accepted": (
        dict(accepted=integers(3, 1, 2, 0)),
        "accepted: expected 0 to 0 of the tokens of sequence 1, got 1",
    ),
    "written past the pool": (
        dict(output_state_indices=integers(5, 6, -1, 3)),
        "output_state_indices: expected indices below slots = 6 (negative: padding), got 6",
    ),
    "written twice": (
        dict(output_state_indices=integers(5, 3, -1, 3)),
        "output_state_indices: expected each slot at most once, got slot 3 repeatedly",
    ),
    "written and read": (
        dict(output_state_indices=integers(5, 4, -1, 2)),
        "output_state_indices: expected no slot that another sequence reads, got slot 4",
    ),
    "twice in place": (
        dict(state_indices=integers(4, 1, 4, 2), accepted=integers(0, 0, 1, 1)),
        "state_indices: expected no slot that another sequence reads, got slot 4",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_wrong_ragged_step(name):
    wrong, message = STEPS[name]
    arguments = good("delta_rule_step", B=1, T=wrong.get("T", 6), slots=6) | RAGGED | wrong
    arguments.pop("T", None)
    refuse("delta_rule_step", arguments, ValueError, message)


@pytest.mark.parametrize(
    "right",
    [
        dict(accepted=integers(3, 0, 1, 0)),
        dict(state_indices=integers(4, 4, 4, 2), output_state_indices=integers(3, 1, -1, 2)),
        dict(state_indices=integers(4, 1, 0, -2), output_state_indices=integers(4, 5, -1, 4)),
        dict(state_indices=integers(4, 4, 4, 2), accepted=integers(0, 0, 0, 1)),
        dict(
            state_indices=integers(4, 4, 4, 2),
            output_state_indices=integers(4, 4, 3, 2),
            accepted=integers(0, 0, 1, 1),
        ),
    ],
)
def test_right_ragged_steps(right):
    """Slots that are only read may be read by several; padding and idle sequences write nothing."""
    call("delta_rule_step", good("delta_rule_step", B=1, slots=6) | RAGGED | right)


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_a_pool_of_another_size_needs_indices(slots):
    message = (
        "state: expected one slot per sequence, slots = B = 2, or state_indices,"
        f" got slots = {slots}"
    )
    refuse("delta_rule_step", good("delta_rule_step", slots=slots), ValueError, message)


def test_a_pool_without_slots_is_for_no_sequence():
    """An array without elements may have any strides."""
    call("delta_rule_step", good("delta_rule_step", B=0, slots=0))


def test_the_most_tokens_a_step_takes():
    call("delta_rule_step", good("delta_rule_step", T=MAX_STEP_TOKENS))
