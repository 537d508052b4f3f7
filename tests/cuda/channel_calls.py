"""Calls of the forward with a gate per key channel in 16 bits, and how their results are judged."""

import ml_dtypes
import numpy as np
from helpers import definition, make_inputs
from rounded import error, rounded_products, twice, wide

from cupy_delta.call import Call
from cupy_delta.cuda.sm90.tiles import CHUNK

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


def make_case(T, *, B=1, H=1, G=1, K=128, V=128, layout="kv", dtype=BF16, **options):
    options = dict(gate="channel", decay=0.3, beta=(0, 2), initial=True) | options
    args, kw = make_inputs(T, B=B, H=H, G=G, K=K, V=V, dtype=dtype, layout=layout, **options)
    args[3:] = (x.astype(np.float32) for x in args[3:])
    return args, kw


def call_of(args, kw, **options):
    (B, T, H, K), (HV, V) = args[0].shape, args[2].shape[2:]
    sizes = dict(B=B, T=T, N=B, H=H, HV=HV, K=K, V=V, gate="channel", scale=K**-0.5)
    return Call(dtype=args[0].dtype, **sizes, state_layout=kw["state_layout"], **options)


def check(args, kw, results):
    """Judge every value head by itself."""
    more, options = wide(args, kw)
    exact, plain = definition(*more, **options), rounded_products(args, kw, CHUNK)
    for x, y, other, axis in zip(results, exact, plain, (2, 1), strict=True):
        for hv in range(y.shape[axis]):
            one, expected, rounded = (a.take(hv, axis) for a in (x, y, other))
            assert error(one, expected) < twice(rounded, expected), (axis, hv)


def same(x, y):
    x, y = (np.ascontiguousarray(a).view(np.uint8) for a in (x, y))
    return np.array_equal(x, y)
