"""States that steps ask the L2 cache for ahead: no bit and no address outside depends on them."""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd
from cupy_delta.cuda.spec import DeviceFacts
from cupy_delta.cuda.tokens import decode
from cupy_delta.cuda.variants import launches_of

FACTS = DeviceFacts(132, 227 * 1024, (9, 0))
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


@pytest.mark.parametrize(
    ("entry", "layout", "dtype", "sizes"),
    [
        ("decode_products", "kv", BF16, dict(T=2, K=128, V=64)),
        ("decode", "vk", BF16, dict(T=1, K=128, V=64)),
        ("decode", "kv", F32, dict(T=3, K=40, V=72)),  # slices reach beyond the state
    ],
)
def test_the_next_state_is_asked_for(emulated, monkeypatch, entry, layout, dtype, sizes):
    """The same bits; nothing outside the pool is asked for, of slots that are padding nothing.

    An address outside every array, such as that of slot -1, is a fault of the emulator's.
    """
    options = dict(B=5, H=1, G=2, gate="scalar", dtype=dtype, layout=layout, initial=True)
    args, kw = make_inputs(**options | sizes)
    slots, one = np.array([2, -1, -9, 5, 0]), 128 * 64 * 2 if dtype == BF16 else 40 * 72 * 4
    results = []
    # With another size of the pool, for a plan of its own.
    monkeypatch.setattr(decode, "FEW_STATES", 0)
    for ahead, more in ((decode.AHEAD_BYTES, 0), (one, 1)):
        monkeypatch.setattr(decode, "AHEAD_BYTES", ahead)
        state = kw["initial_state"].astype(dtype)
        pool = np.concatenate([state[:1]] * (1 + more) + [state])
        options = dict(
            state=pool,
            state_indices=slots + more * (slots >= 0),
            state_layout=layout,
            qk_l2norm=True,
        )
        results.append((cd.delta_rule_step(*args, **options).tobytes(), pool[more:].tobytes()))
        if emulated.devices is not None:
            (launch,) = emulated.devices[-1].launches
            assert launch.entry == entry
            states = ahead // one  # so far ahead there may be none
            assert dict(launch.defines)["AHEAD"] == (states if states < 5 * 2 else 0)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("differs", "states"),
    [
        (dict(), 132),
        (dict(state_layout="vk"), 132),
        (dict(raw="softplus"), 132),
        (dict(K=64, V=64), 0),
        (dict(K=64, V=64, B=529), 528),
        (dict(K=256, V=256), 33),
        (dict(pool_dtype="float32"), 66),
        (dict(pool_dtype="float32", T=4), 66),
        (dict(pool_dtype="float32", B=128), 0),
        (dict(pool_dtype="float32", B=129), 66),
        (dict(B=132), 0),
        (dict(gate="channel"), 132),
        (dict(pool_dtype="float32", gate="channel", state_layout="vk"), 66),
        (dict(gate="channel", state_layout="vk"), 0),
        (dict(pool_dtype="float32", T=4, accepting=True), 0),
        (dict(T=2), 132),
        (dict(T=4, state_layout="vk"), 132),
        (dict(T=4, B=1), 0),
        (dict(T=4, gate="channel"), 0),
        (dict(T=4, accepting=True), 0),
    ],
)
def test_how_far_ahead(differs, states):
    sizes = dict(dtype="bfloat16", pool_dtype="bfloat16", B=256, K=128, V=128, T=1, gate="scalar")
    (launch,) = launches_of(FACTS, ("step",), **sizes | differs)
    assert dict(launch.defines)["AHEAD"] == states
