"""How a caller's code looks to a type checker; never run, but checked with mypy beside the library.

A line that must not pass carries `type: ignore`, which mypy reports as soon as the line passes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import cupy_delta
from cupy_delta.typing import Array, StateLayout


def arrays(x: NDArray[np.float32], cu_seqlens: NDArray[np.int64]) -> None:
    o, final_state = cupy_delta.chunk_delta_rule(
        x,
        x,
        x,
        x,
        x,
        scale=0.5,
        initial_state=x,
        cu_seqlens=cu_seqlens,
        qk_l2norm=True,
        chunk_size=32,
        state_layout="vk",
        out=x,
    )
    shape: tuple[int, ...] = o.shape
    x = final_state
    print(shape, (o - x).max(), np.abs(o), final_state[0] @ x)
    cupy_delta.chunk_delta_rule(x, x, x, x, scale=np.float32(0.5), chunk_size=np.int32(32))
    cupy_delta.chunk_delta_rule([1.0], x, x, x)  # type: ignore[arg-type]
    cupy_delta.chunk_delta_rule(x, x, x)  # type: ignore[call-arg]
    cupy_delta.chunk_delta_rule(x, x, x, x, None, 0.5)  # type: ignore[call-arg]
    cupy_delta.chunk_delta_rule(x, x, x, x, state_layout="kvv")  # type: ignore[arg-type]
    cupy_delta.chunk_delta_rule(x, x, x, x, chunk_size=32.0)  # type: ignore[arg-type]
    cupy_delta.chunk_delta_rule(x, x, x, x, qk_l2norm="no")  # type: ignore[arg-type]
    cupy_delta.chunk_delta_rule(x, x, x, x, causal=True)  # type: ignore[call-arg]


def layout_from_elsewhere(x: NDArray[np.float32], layout: StateLayout, text: str) -> None:
    cupy_delta.recurrent_delta_rule(x, x, x, x, state_layout=layout)
    cupy_delta.recurrent_delta_rule(x, x, x, x, state_layout=text)  # type: ignore[arg-type]


def one_kind_in_and_out(x: NDArray[np.float32]) -> NDArray[np.float32]:
    w, u, _ = cupy_delta.wy_factors(x, x, x, chunk_size=64)
    states, _, final_state = cupy_delta.state_pass(x, w, u, initial_state=x)
    transfer = cupy_delta.sequence_transfer(x, x, x)
    following: Array = transfer.then(transfer).apply(final_state)
    print(following.dtype, cupy_delta.chunk_output(x, x, x, states))
    cupy_delta.delta_rule_step(x, x, x, x)  # type: ignore[call-arg]
    return cupy_delta.delta_rule_step(x, x, x, x, state=x)


def gradients(x: NDArray[np.float32]) -> Array:
    o, _, residuals = cupy_delta.chunk_delta_rule_fwd(x, x, x, x)
    gradients = cupy_delta.chunk_delta_rule_bwd(residuals, o, dfinal_state=None)
    cupy_delta.chunk_delta_rule_bwd(o, residuals)  # type: ignore[arg-type]
    gradients.G  # type: ignore[attr-defined]  # noqa: B018
    q: Array = gradients.q
    return q


def raw_gates(x: NDArray[np.float32]) -> None:
    beta, gate = cupy_delta.SigmoidBeta(x, scale=2), cupy_delta.SoftplusGate(x, x)
    cupy_delta.chunk_delta_rule(x, x, x, beta, gate)
    cupy_delta.wy_factors(x, x, beta, cupy_delta.SigmoidGate(x, x, x, bound=-4))
    cupy_delta.chunk_delta_rule(x, x, x, gate)  # type: ignore[arg-type]
    cupy_delta.chunk_delta_rule(x, x, x, x, beta)  # type: ignore[arg-type]
    cupy_delta.SigmoidGate(x, x, bound="-4")  # type: ignore[arg-type]
    gate.a = x  # type: ignore[misc]


def results_cannot_be_changed(x: NDArray[np.float32]) -> None:
    output = cupy_delta.chunk_delta_rule(x, x, x, x)
    output.o = x  # type: ignore[misc]
    output.state  # type: ignore[attr-defined]  # noqa: B018
