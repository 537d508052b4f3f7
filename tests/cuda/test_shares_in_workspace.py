"""Shares of ranks whose calls keep their buffers in a workspace, as a device does."""

import pytest
from emulator import HOPPER, EmulatorDevice, empty
from rounded import error
from shares import ARRAYS, on_one_rank, on_rank, problem, together
from sm90.test_shares import BF16, in_turns

from cupy_delta import Workspace, workspace
from cupy_delta.cuda import operators

LEGS = ["source"]


class KeepingDevice(EmulatorDevice):
    """One whose buffers are those of the workspace that is entered, as `CupyDevice` has them."""

    def empty(self, shape, dtype, name):
        kept = workspace.current()
        if kept is None:
            return empty(shape, dtype, name)
        return kept.take(0, name, shape, dtype, lambda *like: empty(*like, name))


# With K = V, so that what transfers are made of is of one shape.
@pytest.mark.parametrize(
    ("facts", "tokens", "options"),
    [
        ({}, [20, 0, 17], dict(gate="channel", layout="vk", initial=True)),
        (HOPPER, [20, 13, 17], dict(cu_seqlens=[0, 5, 41, 50])),
        (HOPPER, [70, 65, 64], dict(gate="scalar", initial=True)),
    ],
    ids=["portable", "ragged", "in halves"],
)
def test_as_on_one_rank(emulated, monkeypatch, on_reference, facts, tokens, options):
    monkeypatch.setattr(operators, "device_of", lambda x: KeepingDevice(**facts))
    options = dict(H=1, G=2, K=16, V=16, dtype=BF16) | options
    whole = on_reference(problem, tokens, **options)
    args, kwargs, *gradients = whole

    def share(communicator):
        with Workspace():
            return on_rank(communicator, tokens, args, kwargs, *gradients)

    _, final_state, o, _, found = together(in_turns(len(tokens), share))
    exact = on_reference(on_one_rank, *whole)
    bound = 2e-2
    assert error(o, exact[0]) < bound and error(final_state, exact[1]) < bound
    for name in ARRAYS:
        assert found[name] is None or error(found[name], getattr(exact[2], name)) < bound, name
