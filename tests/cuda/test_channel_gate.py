"""A gate per key channel, forward and backward, by the whole way of a CuPy call.

Every pattern of gates has a head of its own, and is judged by itself.
"""

import numpy as np
import pytest
from emulator import HOPPER
from helpers import make_inputs
from rounded import error
from strengths import BF16, CHUNK, F16, F32, NAMES, TOKENS, T, check, output_gradients, results

K = 16


def patterns():
    """Return gates by name, of T tokens and K channels each."""
    rng = np.random.default_rng(3)
    long = -0.02 * rng.exponential(size=(T, K))
    found = {f"mean {mean}": -mean * rng.exponential(size=(T, K)) for mean in (0.01, 0.1, 1, 5)}
    found["bound -5"] = -5 / (1 + np.exp(-4 * rng.standard_normal((T, K))))
    found["constant 0"] = np.zeros((T, K))
    found["some channels forget"] = g = long.copy()
    g[:, ::3] = -20
    for reset in (-20, -88, -1000, -np.inf):
        found[f"single channels of {reset}"] = g = long.copy()
        for token in TOKENS:
            g[token, token % 5 :: token % 3 + 2] = reset
    found["all channels of one token"] = g = long.copy()
    g[36] = -np.inf
    found["a run of resets"] = g = long.copy()
    g[20:36, 1::2] = -np.inf
    return found


PATTERNS = patterns()


def inputs(dtype, **more):
    options = dict(dtype=dtype, gate="channel", initial=True, beta=(0, 2), correlation=0.3) | more
    args, kw = make_inputs(T, H=len(PATTERNS), K=K, V=32, **options)
    args[3] = args[3].astype(np.float32)
    args[4] = np.stack([*PATTERNS.values()], axis=1)[None].astype(np.float32)
    return args, kw, *output_gradients(args, kw)


@pytest.mark.ptx_leg(dtype=[F16, F32])
@pytest.mark.parametrize(
    ("dtype", "facts"), [(BF16, {}), (F16, {}), (F32, {}), (BF16, HOPPER), (F16, HOPPER)]
)
def test_decays_of_every_strength(emulated, on_reference, dtype, facts):
    emulated(None, **facts)
    check(on_reference, PATTERNS, 64 if facts else CHUNK[dtype], *inputs(dtype))


@pytest.mark.parametrize("facts", [{}, HOPPER], ids=["portable", "hopper"])
def test_ragged_sequences_grouped_heads_and_norms(emulated, on_reference, facts):
    emulated(**facts)
    options = dict(dtype=BF16, gate="channel", initial=True, layout="vk", beta=(0, 2))
    args, kw = make_inputs(T, H=2, G=2, K=24, V=40, cu_seqlens=[0, 0, 1, 40, T], **options)
    kw["qk_l2norm"] = True
    found = results(args, kw, args[2], kw["initial_state"])
    expected = on_reference(results, args, kw, args[2], kw["initial_state"])
    for name in NAMES:
        assert found[name].dtype == expected[name].dtype, name
        assert error(found[name], expected[name]) < 2e-2, name
