"""What ranks must have in common, found out before anything that depends on it is sent.

Each rank tells the others what its call looks like, in a note of fixed size. One that cannot make
its call tells that instead, so that it is an error on every rank and no rank waits for another.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .communicators import Communicator

NOTE_BYTES = 1024
LONGEST_TEXT = 700
ERRORS = {x.__name__: x for x in (NotImplementedError, TypeError, ValueError)}
OF_TYPE = ("arrays", "dtype")  # fields whose difference is a TypeError

_agreed: dict[int, set] = {}  # by the number of a communicator, as long as there is that one


def agreed(communicator: Communicator) -> set:
    """Return the calls that all ranks of a communicator have agreed on, by what they look like.

    Of one that cannot be seen to go nothing is kept: its ranks agree on every call.
    """
    key = id(communicator)
    if key not in _agreed:
        try:
            weakref.finalize(communicator, _agreed.pop, key)
        except TypeError:
            return set()
        _agreed[key] = set()
    return _agreed[key]


def agree(communicator: Communicator, describe: Callable[[], dict[str, Any]]) -> list[dict]:
    """Describe this rank's call, and return the descriptions of all ranks.

    Raises what any rank raises. The fields of "alike" must be the same on all ranks.
    """
    own_error, note = None, {}
    try:
        note = describe()
    except tuple(ERRORS.values()) as error:
        own_error = error
        # NotImplementedError is no subclass of the others, but a subclass of any may come.
        name = next(name for name, cls in ERRORS.items() if isinstance(error, cls))
        note = {"error": name, "text": str(error)[:LONGEST_TEXT]}
    notes = _exchange(communicator, note)
    if own_error is not None:
        raise own_error
    for rank, other in enumerate(notes):
        if "error" in other:
            raise ERRORS[other["error"]](f"rank {rank}: {other['text']}")
    for rank, other in enumerate(notes):
        _compare(notes[0]["alike"], other["alike"], rank)
    return notes


def _exchange(communicator: Communicator, note: dict) -> list[dict]:
    text = json.dumps(note).encode()
    if len(text) > NOTE_BYTES:  # an error's text of characters that take several bytes
        text = json.dumps(note | {"text": note.get("text", "")[: LONGEST_TEXT // 7]}).encode()
    x = np.frombuffer(text.ljust(NOTE_BYTES), np.uint8)
    return [json.loads(bytes(row)) for row in communicator.all_gather(x)]


def _compare(first: dict, other: dict, rank: int) -> None:
    for field, wanted in first.items():
        if other.get(field) != wanted:
            error = TypeError if field.startswith(OF_TYPE) else ValueError
            raise error(
                f"{field}: expected the same on every rank, got {wanted} on rank 0"
                f" and {other.get(field)} on rank {rank}"
            )
