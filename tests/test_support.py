"""The page of what is supported: made from the table, and true on NumPy arrays."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import cupy_delta as cd
from cupy_delta.arrays import FLOAT_DTYPES
from cupy_delta.cuda.families import OPTIONS, support

ROOT = Path(__file__).resolve().parents[1]
CELLS = [(c.operation, c.option) for c in support(("sm_80",))]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says():
    wanted = load(ROOT / "docs" / "support.py").page()
    found = (ROOT / "docs" / "support.md").read_text()
    assert found == wanted, "run: python docs/support.py"


def arguments(option, T):
    """Arrays and options of a call on the host."""
    asked = dict(dtype=FLOAT_DTYPES["bfloat16"], K=16, V=8) | OPTIONS[option]
    rng = np.random.default_rng(0)
    dtype, K, V = (asked[name] for name in ("dtype", "K", "V"))
    q, k, v = (rng.standard_normal((1, T, 2, n)).astype(dtype) / 4 for n in (K, K, V))
    beta = rng.uniform(0, 1, v.shape if asked.get("beta_per_value") else v.shape[:3])
    shape = {"scalar": v.shape[:3], "channel": k.shape}.get(asked.get("gate"))
    g = None if shape is None else -rng.uniform(0, 1, shape).astype(dtype)
    beta = beta.astype(dtype)
    if "raw_gate" in asked:
        g = cd.SoftplusGate(g, np.zeros(2, dtype), np.ones(2, dtype))
    if "raw_beta" in asked:
        beta = cd.SigmoidBeta(beta)
    named = ("qk_l2norm", "chunk_size", "state_layout", "checkpoint_every")
    options = {n: asked[n] for n in named if n in asked}
    if "pool_slots" in asked:
        options["state"] = np.zeros((1, 2, K, V), asked["pool_dtype"])
    if asked.get("varlen"):
        options["cu_seqlens"] = np.array([0, 3, T])
    if asked.get("accepting"):
        options["accepted"] = np.array([1])
    return (q.astype(dtype), k.astype(dtype), v.astype(dtype), beta, g), options


def pick(options, *names):
    return {n: x for n, x in options.items() if n in names}


def call(operation, args, options):
    """Call the function that an operation is of; return an array of its results."""
    q, k, v, beta, g = args
    sequences = pick(options, "chunk_size", "cu_seqlens")
    normed = sequences | pick(options, "qk_l2norm")
    if operation == "forward":
        return cd.chunk_delta_rule(*args, **options).o
    if operation in ("training", "backward"):
        forward = cd.chunk_delta_rule_fwd(*args, **options)
        return cd.chunk_delta_rule_bwd(forward.residuals, np.ones_like(v)).q
    if operation == "recurrent":
        return cd.recurrent_delta_rule(*args, **options).o
    if operation == "step":
        size = k.shape[3], v.shape[3]
        size = size[::-1] if options.get("state_layout") == "vk" else size
        real = np.float64 if v.dtype == np.float64 else np.float32
        N = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else 1
        options = {"state": np.zeros((N, 2, *size), real)} | options
        return cd.delta_rule_step(*args, **options)
    if operation == "transfer":
        return cd.sequence_transfer(k, v, beta, g, **normed).p
    factors = cd.wy_factors(k, v, beta, g, **normed)
    if operation == "wy_factors":
        return factors.t
    passed = cd.state_pass(k, factors.w, factors.u, g, **normed)
    if operation == "state_pass":
        return passed.final_state
    return cd.chunk_output(q, k, passed.v_new, passed.states, g, **normed)


@pytest.mark.parametrize(("operation", "option"), CELLS)
def test_numpy_arrays_have_every_option_of_every_function(operation, option):
    args, options = arguments(option, T=5 if operation == "step" else 70)
    assert np.isfinite(call(operation, args, options).astype(np.float64)).all()
