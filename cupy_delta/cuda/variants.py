"""The kernels that a call of given shapes needs, so that they can be compiled ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..arrays import FLOAT_DTYPES
from ..call import Call
from . import plan as plans
from .runtime.sources import AT_ONCE
from .spec import DeviceFacts, Launch

PASSES = ("forward", "backward", "recurrent", "step", "blocks")


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
    gate: bool = False,
    varlen: bool = False,
    qk_l2norm: bool = False,
    state_layout: str = "kv",
) -> list[Launch]:
    """Plan the passes of a call and return its distinct kernels.

    Parameters
    ----------
    facts : DeviceFacts
    passes : tuple of {"forward", "backward", "recurrent", "step", "blocks"}
        "blocks" are the WY building blocks.
    dtype : str
        Of q, k and v; beta and g count as float32, decoding pools as float32 (or float64).
    K, V, B, T, H, HV
        Sizes as in `chunk_delta_rule`; with `varlen`, B is the number of sequences.
    chunk_size, gate, varlen, qk_l2norm, state_layout
        Options as in `chunk_delta_rule`.

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
    batch, N = (1, B) if varlen else (B, B)
    call = Call(
        dtype=FLOAT_DTYPES[dtype],
        B=batch,
        T=T,
        N=N,
        H=H,
        HV=HV,
        K=K,
        V=V,
        gate="scalar" if gate else None,
        varlen=varlen,
        slots=N,
        scale=K**-0.5,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        state_layout=state_layout,
    )
    call = replace(call, pool_dtype=call.state_dtype)
    planned = []
    if "forward" in passes:
        planned.append(plans.plan_forward(call, facts))
    if "backward" in passes:
        plans.check_gate_gradients(call)
        planned.append(plans.plan_forward(call, facts, True))
        planned.append(plans.plan_backward(call, facts, True))
    if "recurrent" in passes:
        planned.append(plans.plan_tokens(call, False))
    if "step" in passes:
        # One sequence per batch row: a step knows no cu_seqlens.
        planned.append(plans.plan_tokens(replace(call, B=N, varlen=False), True))
    if "blocks" in passes:
        planned += _blocks(replace(call, state_layout="kv"), facts)
    distinct = {}
    for plan in planned:
        for launch in plan.launches:
            distinct.setdefault((launch.file, launch.defines), launch)
    return list(distinct.values())


def _blocks(call: Call, facts: DeviceFacts) -> list[plans.Plan]:
    call = replace(call, chunks=call.chunk_slots(plans.chunk_of(call)))
    return [
        plans.plan_wy_factors(call, facts),
        plans.plan_state_pass(call, facts),
        plans.plan_chunk_output(call, facts),
        plans.plan_transfer(call, facts),
    ]


def compile_variants(device, launches: list[Launch]) -> Iterator[Launch]:
    """Compile kernels on a device, into CuPy's cache on disk, several at a time, and yield them."""
    for start in range(0, len(launches), AT_ONCE):
        some = tuple(launches[start : start + AT_ONCE])
        with device:
            device.prepare(some)
        yield from some
