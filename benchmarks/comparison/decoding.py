"""Who decodes: each takes the same inputs, and makes a call on every pool, as layers of a model do.

Gates are given raw, as models have them: FlashInfer takes nothing else. Its kernels know the scalar
gate alone, states in (V, K), and more than one token for some pools only.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import cupy
import ml_dtypes
import numpy as np

import cupy_delta

H, HV, D = 16, 32, 128
BF16 = np.dtype(ml_dtypes.bfloat16)


class Inputs(NamedTuple):
    """New tokens of B sequences, a pool with B slots for every call, and slots in each of them."""

    q: Any
    k: Any
    v: Any
    a: Any  # the gate's logits, None without a gate
    b: Any  # those of beta
    A_log: Any
    dt_bias: Any
    pools: Any  # (calls, B, HV, D, D)
    indices: Any  # (B,)

    def formed(self):
        """Beta and g, in float32."""
        beta = 1 / (1 + cupy.exp(-self.b.astype(np.float32)))
        if self.a is None:
            return beta, None
        A_log, dt_bias = self.A_log, self.dt_bias
        if self.a.ndim == 4:
            A_log = A_log[:, None]
        x = self.a.astype(np.float32) + dt_bias
        return beta, -cupy.exp(A_log) * cupy.logaddexp(np.float32(0), x)


def draw(row, pool_dtype) -> Inputs:
    rng = cupy.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    B, T = row.B, row.T
    q, k, v = (normal(B, T, n, D).astype(BF16) for n in (H, H, HV))
    shape = {"none": None, "scalar": (B, T, HV), "channel": (B, T, HV, D)}[row.gate]
    a = None if shape is None else normal(*shape).astype(BF16)
    A_log = normal(HV) - 2
    dt_bias = normal(*(() if shape is None else shape[2:]))
    pools = cupy.empty((row.calls, B, HV, D, D), pool_dtype)
    for pool in pools:  # in parts, for want of memory
        pool[...] = (normal(B, HV, D, D) / 8).astype(pool_dtype)
    b = normal(B, T, HV).astype(BF16)
    return Inputs(q, k, v, a, b, A_log, dt_bias, pools, cupy.arange(B))


class Ours:
    """`delta_rule_step`."""

    name = "cupy_delta"

    def __init__(self, row, inputs: Inputs):
        self.row, self.inputs = row, inputs
        beta, g = cupy_delta.SigmoidBeta(inputs.b), None
        if inputs.a is not None:
            g = cupy_delta.SoftplusGate(inputs.a, inputs.A_log, inputs.dt_bias)
        self.arrays = (inputs.q, inputs.k, inputs.v, beta, g)
        self.out = cupy.empty_like(inputs.v)
        self.options = dict(qk_l2norm=True, state_layout=row.layout, out=self.out)
        if row.what == "verify":
            self.options["accepted"] = cupy.zeros(row.B, np.int64)
        self.workspace = cupy_delta.Workspace()

    def call(self, i: int):
        """Make the call on the i-th pool."""
        pool = dict(state=self.inputs.pools[i], state_indices=self.inputs.indices)
        return cupy_delta.delta_rule_step(*self.arrays, **self.options, **pool)

    def graph(self, graph_of, stream):
        calls = [lambda i=i: self.call(i) for i in range(self.row.calls)]
        with self.workspace:
            return graph_of(calls, stream)


class OursFormed(Ours):
    """The same with beta and g as arrays, which with one token is another program."""

    name = "cupy_delta, arrays"

    def __init__(self, row, inputs: Inputs):
        super().__init__(row, inputs)
        self.arrays = (inputs.q, inputs.k, inputs.v, *inputs.formed())


class FlashInfer:
    """`flashinfer.gdn_decode`, on PyTorch's current stream."""

    name = "flashinfer"

    @staticmethod
    def there() -> bool:
        return find_spec("flashinfer") is not None and find_spec("torch") is not None

    def __init__(self, row, inputs: Inputs):
        import torch
        from flashinfer import gdn_decode

        if row.gate != "scalar" or row.layout != "vk":
            raise NotImplementedError("a scalar gate and (V, K) states")
        self.row, self.library = row, gdn_decode
        self.pools = [torch.from_dlpack(x) for x in inputs.pools]
        names = ("q", "k", "v", "A_log", "a", "dt_bias", "b")
        self.arrays = {n: torch.from_dlpack(getattr(inputs, n)) for n in names}
        self.out = torch.empty_like(self.arrays["v"])
        self.indices = torch.from_dlpack(inputs.indices.astype(np.int32))

    def call(self, i: int):
        options = dict(self.arrays, scale=D**-0.5, output=self.out, use_qk_l2norm=True)
        pool = dict(initial_state=self.pools[i], initial_state_indices=self.indices)
        verify = dict(disable_state_update=self.row.what == "verify")
        if self.row.T > 1 and self.row.pool == "float32":
            self.library.gated_delta_rule_mtp(**options, **pool, **verify)
        else:
            more = verify if self.row.T > 1 else {}
            self.library.gated_delta_rule_decode_pretranspose(state=None, **options, **pool, **more)
        return cupy.from_dlpack(self.out)

    def graph(self, graph_of, stream):
        return graph_of([lambda i=i: self.call(i) for i in range(self.row.calls)], stream)


def error(row, inputs: Inputs, contestant) -> float:
    """Largest error of outputs of the first and last sequence, of the largest of them, in float64.

    Of states, too, where they are written. They are those of the first call, and are put back as
    they were.
    """
    before = inputs.pools[0].copy()
    o = contestant.call(0)
    after = inputs.pools[0].copy()
    inputs.pools[0] = before
    ends = [0, row.B - 1]
    beta, g = inputs.formed()
    given = (inputs.q, inputs.k, inputs.v, beta, g)
    args = [None if x is None else x[ends].get().astype(np.float64) for x in given]
    states = before[ends].get().astype(np.float64)
    exact = cupy_delta.recurrent_delta_rule(
        *args, initial_state=states, qk_l2norm=True, state_layout=row.layout
    )
    pairs = [(o[ends].get(), exact.o)]
    pairs.append((after[ends].get(), states if row.what == "verify" else exact.final_state))
    errors = [np.abs(x.astype(np.float64) - y).max() / np.abs(y).max() for x, y in pairs]
    return float(np.max(errors))  # which NaN is, if there is any
