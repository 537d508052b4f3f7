"""The kernels that a call of given shapes needs, so that they can be compiled ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..arrays import FLOAT_DTYPES
from ..problem import Problem
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
    initial_state: bool = True,
    qk_l2norm: bool = False,
    state_layout: str = "kv",
) -> list[Launch]:
    """Plan the passes of a call and return its distinct kernels.

    Parameters
    ----------
    facts : DeviceFacts
    passes : tuple of {"forward", "backward", "recurrent", "step", "blocks"}
        "blocks" are the WY building blocks, which take neither a gate nor qk_l2norm.
    dtype : str
        Of q, k and v; beta and g count as float32, decoding pools as float32 (or float64).
    K, V, B, T, H, HV
        Sizes as in `chunk_delta_rule`; with `varlen`, B is the number of sequences.
    chunk_size, gate, varlen, initial_state, qk_l2norm, state_layout
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
    real = np.dtype(np.float64 if dtype == "float64" else np.float32)

    def stand_in(*shape, of=FLOAT_DTYPES[dtype]):
        return np.broadcast_to(np.zeros((), of), shape)

    state = (N, HV, K, V) if state_layout == "kv" else (N, HV, V, K)
    problem = Problem(
        kind="cupy",
        dtype=FLOAT_DTYPES[dtype],
        B=batch,
        T=T,
        N=N,
        H=H,
        HV=HV,
        K=K,
        V=V,
        q=stand_in(batch, T, H, K),
        k=stand_in(batch, T, H, K),
        v=stand_in(batch, T, HV, V),
        beta=stand_in(batch, T, HV, of=real),
        g=stand_in(batch, T, HV, of=real) if gate else None,
        cu_seqlens=stand_in(N + 1, of=np.int64) if varlen else None,
        initial_state=stand_in(*state, of=real) if initial_state else None,
        state=stand_in(*state, of=real),
        scale=K**-0.5,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        state_layout=state_layout,
    )
    planned = []
    if "forward" in passes:
        planned.append(plans.plan_forward(problem, facts))
    if "backward" in passes:
        plans.check_gate_gradients(problem)
        planned.append(plans.plan_forward(problem, facts, True))
        planned.append(plans.plan_backward(problem, facts, True))
    if "recurrent" in passes:
        planned.append(plans.plan_tokens(problem, False))
    if "step" in passes:
        # One sequence per batch row: a step knows no cu_seqlens.
        planned.append(plans.plan_tokens(replace(problem, B=N, cu_seqlens=None), True))
    if "blocks" in passes:
        planned += _blocks(replace(problem, g=None, qk_l2norm=False, state_layout="kv"), facts)
    distinct = {}
    for plan in planned:
        for launch in plan.launches:
            distinct.setdefault((launch.file, launch.defines), launch)
    return list(distinct.values())


def _blocks(problem: Problem, facts: DeviceFacts) -> list[plans.Plan]:
    chunk = plans.chunk_of(problem)
    states = np.broadcast_to(
        np.zeros((), problem.state_dtype), plans.chunked_states(problem, chunk)
    )
    problem = replace(problem, w=problem.k, u=problem.v, v_new=problem.v, states=states)
    return [
        plans.plan_wy_factors(problem, facts),
        plans.plan_state_pass(problem, facts),
        plans.plan_chunk_output(problem, facts),
        plans.plan_transfer(problem, facts),
    ]


def compile_variants(device, launches: list[Launch]) -> Iterator[Launch]:
    """Compile kernels on a device, into CuPy's cache on disk, several at a time, and yield them."""
    for start in range(0, len(launches), AT_ONCE):
        some = tuple(launches[start : start + AT_ONCE])
        with device:
            device.prepare(some)
        yield from some
