"""All options of the chunked operator in combination: every pair of values meets in some case."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd

# What NVRTC makes of the same kernels runs in the operators' tests.
LEGS = ["source"]
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
BOUND = {BF16: 2e-2, F16: 3e-3, F32: 5e-6}
VALUES = {
    "dtype": (BF16, F16, F32),
    "beta_dtype": ("same", "float32"),
    "sequences": ("batch", "empty batch", "int32", "int64"),
    "gate": (None, "scalar"),
    "layout": ("kv", "vk"),
    "initial": (False, True),
    "qk_l2norm": (False, True),
    "scale": (None, 0.7),
    "chunk_size": (None, 16, 64),
    "G": (1, 3),
    "K": (17, 64),
    "V": (16, 40),
    "memory": ("contiguous", "strided", "read-only"),
    "out": (False, True),
    "gradients": (False, True),
}


def pairs(case):
    return set(itertools.combinations(case.items(), 2))


def pairwise() -> list[dict]:
    """Choose cases greedily until every pair of values is in one of them."""
    missing = {
        pair
        for (a, xs), (b, ys) in itertools.combinations(VALUES.items(), 2)
        for pair in itertools.product(((a, x) for x in xs), ((b, y) for y in ys))
    }
    rng, cases = np.random.default_rng(0), []
    while missing:
        drawn = [
            {name: xs[i] for (name, xs), i in zip(VALUES.items(), row, strict=True)}
            for row in rng.integers(0, [len(xs) for xs in VALUES.values()], (200, len(VALUES)))
        ]
        best = max(drawn, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


def error(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert x.shape == y.shape
    return 0.0 if y.size == 0 else np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


def arrays_of(case):
    B, cu = 2, None
    if case["sequences"] == "empty batch":
        B = 0
    elif case["sequences"] != "batch":
        B, cu = 1, np.array([0, 0, 1, 40, 70], case["sequences"])
    args, kw = make_inputs(
        70,
        B=B,
        H=2,
        cu_seqlens=cu,
        beta=(0, 2),
        **{name: case[name] for name in ("dtype", "gate", "layout", "initial", "G", "K", "V")},
    )
    if case["beta_dtype"] != "same":
        args[3] = args[3].astype(case["beta_dtype"])
        args[4] = None if args[4] is None else args[4].astype(case["beta_dtype"])
    if case["memory"] == "strided":
        args = [None if x is None else np.asfortranarray(x) for x in args]
    if case["memory"] == "read-only":
        for x in filter(lambda x: x is not None, args):
            x.flags.writeable = False
    return args, kw | {name: case[name] for name in ("qk_l2norm", "scale", "chunk_size")}


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case.values())))
def test_pairs_of_options(emulated, on_reference, case):
    args, kw = arrays_of(case)
    do = np.random.default_rng(1).standard_normal(args[2].shape).astype(case["dtype"])

    def call():
        out = np.full(args[2].shape, np.nan, case["dtype"]) if case["out"] else None
        if not case["gradients"]:
            result = cd.chunk_delta_rule(*args, **kw, out=out)
            assert out is None or result.o is out
            return [result.o, result.final_state]
        forward = cd.chunk_delta_rule_fwd(*args, **kw)
        back = cd.chunk_delta_rule_bwd(forward.residuals, do)
        return [forward.o, forward.final_state, *(x for x in back if x is not None)]

    for x, y in zip(call(), on_reference(call), strict=True):
        assert x.dtype == y.dtype
        assert error(x, y) < BOUND[case["dtype"]]


def test_the_cases_have_every_pair():
    cases = pairwise()
    sizes = [len(xs) for xs in VALUES.values()]
    wanted = sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(set().union(*map(pairs, cases))) == wanted
    assert len(cases) < 40
