"""In which form a step's loads stand, by what it is given."""

import pytest

from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.variants import launches_of

FACTS = DeviceFacts(132, 227 * 1024, (9, 0))
VK, WIDE, MANY = dict(state_layout="vk"), dict(pool_dtype="float32"), dict(B=129)


@pytest.mark.parametrize(
    ("differs", "ordered", "streamed", "rows"),
    [
        (dict(), 1, 1, "own, first"),
        (dict(raw="softplus"), 1, 1, "own, first"),
        (dict(raw="softplus", gate="channel"), 1, 1, "shared, first"),
        (VK, 1, 1, "own, first"),
        (VK | dict(B=129), 1, 1, "own, late"),
        (VK | dict(raw="softplus"), 1, 1, "own, first"),
        (VK | dict(raw="softplus", B=129), 1, 1, "own, late"),
        (VK | dict(gate="channel", B=129), 1, 1, "own, first"),
        (dict(T=8), 0, 0, "shared, first"),
        (WIDE, 1, 0, "own, first"),
        (WIDE | dict(T=4, raw="softplus"), 1, 0, "shared, first"),
        (WIDE | VK, 0, 0, "own, first"),
        (WIDE | VK | dict(raw="softplus"), 0, 0, "shared, first"),
        (WIDE | VK | dict(T=4), 1, 0, "shared, first"),
        (WIDE | VK | dict(T=4, accepting=True), 0, 0, "shared, first"),
        (WIDE | VK | dict(T=4, raw="softplus"), 0, 0, "shared, first"),
    ],
)
def test_how_loads_stand(differs, ordered, streamed, rows):
    sizes = dict(dtype="bfloat16", pool_dtype="bfloat16", K=128, V=128, T=1, gate="scalar")
    (launch,) = launches_of(FACTS, ("step",), **sizes | differs)
    macros = dict(launch.defines)
    own, first = "own" if macros["OWN_ROWS"] else "shared", macros["ROWS_FIRST"]
    assert (macros["ORDERED"], macros["STREAMED"]) == (ordered, streamed)
    assert f"{own}, {'first' if first else 'late'}" == rows


@pytest.mark.parametrize(
    ("differs", "blocks"),
    [
        (dict(), 4),
        (MANY, 5),
        (MANY | dict(raw="softplus"), 5),
        (MANY | dict(gate="channel"), 4),
        (MANY | dict(raw="softplus", gate="channel"), 1),
        (VK, 7),
        (MANY | VK | dict(gate="channel"), 7),
        (MANY | WIDE, 1),
        (WIDE, 4),
        (WIDE | dict(gate="channel"), 4),
        (WIDE | VK, 0),
        (WIDE | dict(dtype="float64", pool_dtype="float64"), 1),
        (MANY | WIDE | dict(T=4), 4),
        (MANY | WIDE | dict(T=4, gate="channel"), 1),
        (MANY | WIDE | VK | dict(T=4), 5),
    ],
)
def test_for_how_many_blocks_registers_are_spared(differs, blocks):
    sizes = dict(dtype="bfloat16", pool_dtype="bfloat16", K=128, V=128, T=1, gate="scalar")
    (launch,) = launches_of(FACTS, ("step",), **sizes | differs)
    assert dict(launch.defines)["BLOCKS"] == blocks


@pytest.mark.parametrize(
    ("differs", "packed"),
    [
        (dict(), 0),
        (MANY, 1),
        (MANY | dict(gate=None, pool_dtype="float16"), 1),
        (MANY | dict(raw="softplus"), 1),
        (MANY | dict(gate="channel"), 0),
        (MANY | dict(V=1), 0),
        (MANY | dict(T=8), 0),
        (MANY | VK, 0),
        (MANY | WIDE, 0),
    ],
)
def test_what_is_unpacked_again(differs, packed):
    sizes = dict(dtype="bfloat16", pool_dtype="bfloat16", K=128, V=128, T=1, gate="scalar")
    (launch,) = launches_of(FACTS, ("step",), **sizes | differs)
    assert dict(launch.defines)["PACKED"] == packed


@pytest.mark.parametrize(
    ("differs", "early"),
    [
        (dict(), 1),
        (MANY, 1),
        (MANY | VK | dict(raw="softplus"), 1),
        (MANY | VK | dict(raw="softplus", gate="channel"), 1),
        (WIDE, 1),
        (WIDE | VK, 1),
        (MANY | WIDE, 0),
        (MANY | WIDE | VK, 0),
        (WIDE | VK | dict(raw="softplus"), 0),
        (WIDE | dict(raw="softplus"), 1),
        (dict(T=8), 0),
    ],
)
def test_what_is_made_early(differs, early):
    sizes = dict(dtype="bfloat16", pool_dtype="bfloat16", K=128, V=128, T=1, gate="scalar")
    (launch,) = launches_of(FACTS, ("step",), **sizes | differs)
    assert dict(launch.defines)["EARLY"] == early
