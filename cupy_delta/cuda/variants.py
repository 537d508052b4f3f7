"""The kernels that a call of given shapes needs, so that they can be compiled ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..arrays import FLOAT_DTYPES
from ..call import Call, Gate
from ..raw import Bias, Formula, RawBeta, RawGate
from ..typing import StateLayout
from .plan import plan
from .runtime.sources import AT_ONCE
from .spec import Compiler, DeviceFacts, Launch
from .tokens.decode_products import MOST_TOKENS

# What is computed in each pass, in the order in which it is refused.
OPERATIONS = {
    "forward": ("forward",),
    "prefill": ("forward",),
    "backward": ("backward", "training"),
    "recurrent": ("recurrent",),
    "step": ("step",),
    "blocks": ("wy_factors", "state_pass", "chunk_output", "transfer"),
}
PASSES = tuple(OPERATIONS)
# Tokens of the steps that have kernels of their own; the last are those of more.
STEPS = range(1, MOST_TOKENS + 2)


def launches_of(
    facts: DeviceFacts,
    passes: tuple[str, ...],
    *,
    dtype: str,
    K: int,
    V: int,
    B: int = 1,
    T: int = 1024,
    H: int = 1,
    HV: int | None = None,
    chunk_size: int | None = None,
    gate: bool | Gate = False,
    narrow_gate: bool = False,
    raw: Formula | None = None,
    varlen: bool = False,
    qk_l2norm: bool = False,
    state_layout: StateLayout = "kv",
    checkpoint_every: int | None = None,
    pool_dtype: str | None = None,
    accepting: bool = False,
) -> list[Launch]:
    """Plan the passes of a call and return its distinct kernels.

    Parameters
    ----------
    facts : DeviceFacts
    passes : tuple of {"forward", "prefill", "backward", "recurrent", "step", "blocks"}
        "prefill" is the forward on a pool of states, "blocks" are the WY building blocks.
    dtype : str
        Of q, k and v; beta and g count as float32 (or float64), but for `narrow_gate`.
    K, V, B, T, H, HV
        Sizes as in `chunk_delta_rule`; with `varlen`, B is the number of sequences.
    gate : bool or {"scalar", "channel"}
        With one gate per value head, as True also means, or one per key channel.
    narrow_gate : bool
        Whether g per key channel is of `dtype`, where that has 16 bits.
    raw : {"softplus", "sigmoid"}, optional
        With a `SoftplusGate` or `SigmoidGate` whose bias is as its logits are, and a `SigmoidBeta`;
        the logits of `dtype`.
    chunk_size, varlen, qk_l2norm, state_layout, checkpoint_every
        Options as in `chunk_delta_rule`; the last of "prefill" alone.
    pool_dtype : str, optional
        Of pools, by default float32 (or float64).
    accepting : bool
        Whether a step is told how many of its tokens its states take up.

    Returns
    -------
    list of Launch
        One per file and macros.

    Raises
    ------
    NotImplementedError
        As the call itself would.
    """
    HV = H if HV is None else HV
    real = FLOAT_DTYPES[dtype]
    kind: Gate | None = "scalar" if gate is True or (raw and not gate) else gate or None
    raw_gate = raw_beta = None
    if raw is not None:
        bias: Bias = "channel" if kind == "channel" else "head"
        # The numbers are arguments of kernels, whatever they are.
        raw_gate, raw_beta = RawGate(raw, real, bias, -1.0), RawBeta(real, 1.0)
    batch, N = (1, B) if varlen else (B, B)
    call = Call(
        dtype=real,
        B=batch,
        T=T,
        N=N,
        H=H,
        HV=HV,
        K=K,
        V=V,
        gate=kind,
        narrow_gate=narrow_gate and kind == "channel" and raw is None and real.itemsize == 2,
        raw_gate=raw_gate,
        raw_beta=raw_beta,
        varlen=varlen,
        scale=K**-0.5,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        state_layout=state_layout,
    )
    calls = dict.fromkeys(PASSES, call)
    # A step of one sequence per batch row, and ragged ones. Building blocks have one layout.
    stored = call.state_dtype if pool_dtype is None else FLOAT_DTYPES[pool_dtype]
    on_pool = replace(call, pool_slots=N, pool_dtype=stored, pool_stride=HV * K * V)
    calls["prefill"] = replace(on_pool, checkpoint_every=checkpoint_every)
    on_pool = replace(on_pool, accepting=accepting)
    calls["step"] = replace(on_pool, B=N, varlen=False)
    calls["blocks"] = replace(call, state_layout="kv")
    planned = [
        plan(operation, calls[name], facts) for name in passes for operation in OPERATIONS[name]
    ]
    if varlen and "step" in passes:
        planned.append(plan("step", on_pool, facts))
    distinct: dict[tuple, Launch] = {}
    for one in planned:
        for launch in one.launches:
            distinct.setdefault((launch.file, launch.defines), launch)
    return list(distinct.values())


def compile_variants(device: Compiler, launches: list[Launch]) -> Iterator[Launch]:
    """Compile kernels on a device, into CuPy's cache on disk, several at a time, and yield them."""
    for start in range(0, len(launches), AT_ONCE):
        some = tuple(launches[start : start + AT_ONCE])
        with device:
            device.prepare(some)
        yield from some
