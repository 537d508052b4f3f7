"""From arrays to custom calls, under every transformation of JAX.

A call is differentiated by its own backward, vectorised by folding the new axis into the batch,
and lowered for the platform that its arrays turn out to be on.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp

from ..call import Call
from ..results import DeltaRuleGradients, DeltaRuleOutput
from . import ffi, platforms
from .work import (
    BACKWARD,
    FORWARD,
    RECURRENT,
    STEP,
    Buffer,
    Options,
    Work,
    buffers_of,
    described,
)

# ---- differentiated ------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(function: str, options: Options, arrays: dict) -> DeltaRuleOutput:
    made = evaluate(function, options, arrays)
    return DeltaRuleOutput(made["o"], made["final_state"])


def _whole_forward(function: str, options: Options, arrays: dict):
    if function == RECURRENT:
        if arrays["beta"].ndim == 4:
            raise NotImplementedError(
                "beta: gradients with one strength per value channel, (B, T, HV, V), are not"
                " supported; with one per head, (B, T, HV), they are"
            )
        return _whole(function, options, arrays), (arrays, {})
    residuals = evaluate(FORWARD, options, arrays)
    outputs = DeltaRuleOutput(residuals.pop("o"), residuals.pop("final_state"))
    return outputs, (arrays, residuals)


def _whole_backward(function: str, options: Options, saved, gradients: DeltaRuleOutput):
    arrays, residuals = saved
    if not residuals:
        residuals = evaluate(FORWARD, options, arrays)
        del residuals["o"], residuals["final_state"]
    entering = dict(do=gradients.o, dfinal_state=gradients.final_state)
    made = evaluate(BACKWARD, options, arrays | residuals | entering)
    return ({name: made.get(f"d{name}") for name in arrays},)


_whole.defvjp(_whole_forward, _whole_backward)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(options: Options, arrays: dict):
    made = evaluate(STEP, options, arrays)
    return made["o"], made["state"]


@_step.defjvp
def _step_jvp(options, primals, tangents):
    raise NotImplementedError(
        "delta_rule_step: a decoding step has no gradients; chunk_delta_rule and"
        " recurrent_delta_rule have"
    )


# Arrays may lie elsewhere than where JAX puts new ones: only what is compiled as a whole is lowered
# for the platform that they are on.
_compiled_whole = jax.jit(_whole, static_argnums=(0, 1))
_compiled_step = jax.jit(_step, static_argnums=0)


def whole(function: str, options: Options, arrays: dict) -> DeltaRuleOutput:
    """Apply an operator to whole sequences."""
    return _compiled_whole(function, options, _varying_alike(arrays))


def step(options: Options, arrays: dict):
    """Advance a pool of states; returns (o, state)."""
    return _compiled_step(options, _varying_alike(arrays))


# ---- vectorised ----------------------------------------------------------------------------------


def evaluate(function: str, options: Options, arrays: dict) -> dict:
    """Return the results of a call by name: outputs, then residuals where there are any."""
    return _vectorised(function, options)(arrays)


@cache
def _vectorised(function: str, options: Options):
    @jax.custom_batching.custom_vmap
    def call(arrays):
        return _lowered(function, options, arrays)

    @call.def_vmap
    def batched(size: int, arguments_batched: list[dict], arrays: dict):
        (is_batched,) = arguments_batched
        arrays = {
            name: x if is_batched[name] else jnp.broadcast_to(x, (size, *x.shape))
            for name, x in arrays.items()
        }
        # Sequences that lie end to end have no batch to fold into, nor has nothing.
        if "cu_seqlens" in arrays or not size:
            made = jax.lax.map(call, arrays)
        else:
            made = {
                name: x.reshape(size, x.shape[0] // size, *x.shape[1:])
                for name, x in call(_folded(size, arrays)).items()
            }
        return made, dict.fromkeys(made, True)

    return call


def _folded(size: int, arrays: dict) -> dict:
    """Fold the first axis of every array into the second, the batch."""
    folded = {name: x.reshape(size * x.shape[1], *x.shape[2:]) for name, x in arrays.items()}
    if "state_indices" in arrays:
        indices, slots = arrays["state_indices"], arrays["state"].shape[1]
        # What is outside of one pool, before or past it, must not become a slot of its neighbour.
        first = slots * jnp.arange(size, dtype=indices.dtype)[:, None]
        moved = jnp.where(indices < slots, indices + first, size * slots)
        folded["state_indices"] = jnp.where(indices < 0, -1, moved).reshape(-1)
    return folded


# ---- lowered -------------------------------------------------------------------------------------


def _lowered(function: str, options: Options, arrays: dict) -> dict:
    """Lower a call for each platform, of which XLA gets the one that it compiles for."""
    call = described(function, options, arrays)
    backends = platforms.supporting(function, call)
    *_, main = backends.values()
    results = _results(function, call, arrays, main)

    def lower(platform: str, arrays: dict) -> dict:
        def bind(sources: dict, targets: tuple[Buffer, ...]) -> dict:
            work = Work(function, call, buffers_of(sources), targets)
            return _custom_call(ffi.target(platform, backend), work, sources)

        backend = backends[platform]
        made = backend.trace(bind, function, call, arrays, results)
        return {x.name: made[x.name] for x in results}

    branches = {platform: partial(lower, platform) for platform in backends}
    return _vary(jax.lax.platform_dependent(arrays, **branches), _axes(arrays))


def _results(function: str, call: Call, arrays: dict, main) -> tuple[Buffer, ...]:
    """Return what a call returns, in order; the residuals are those of the main backend."""
    if function == BACKWARD:
        inputs = [name for name in DeltaRuleGradients._fields if name in arrays]
        return buffers_of({f"d{name}": arrays[name] for name in inputs})
    o = Buffer("o", arrays["v"].shape, call.dtype)
    if function == STEP:
        return (o, *buffers_of({"state": arrays["state"]}))
    outputs = o, Buffer("final_state", call.state_shape, call.state_dtype)
    return (*outputs, *main.residuals(call)) if function == FORWARD else outputs


def _custom_call(target: str, work: Work, sources: dict) -> dict:
    names = [x.name for x in work.targets]
    call = jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in work.targets],
        vmap_method="sequential",
        # The pool of states is one buffer, updated in place.
        input_output_aliases={
            i: names.index(name) for i, name in enumerate(sources) if name == "state"
        },
    )
    return dict(zip(names, call(*sources.values(), work=work.text()), strict=True))


# ---- in shard_map --------------------------------------------------------------------------------


def _axes(arrays: dict) -> tuple[str, ...]:
    """Return the axes of a mesh over which any of the arrays varies, in `jax.shard_map`."""
    if not hasattr(jax, "typeof"):
        return ()
    found = dict.fromkeys(axis for x in arrays.values() for axis in _axes_of(jax.typeof(x)))
    return tuple(sorted(found))


def _axes_of(aval) -> frozenset:
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def _vary(arrays: dict, axes: tuple[str, ...]) -> dict:
    """Let every array vary over these axes."""

    def vary(x):
        missing = tuple(axis for axis in axes if axis not in _axes_of(jax.typeof(x)))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)

    return {name: vary(x) for name, x in arrays.items()} if axes else arrays


def varying(arrays: dict, axes: tuple[str, ...]) -> dict:
    """Let all arrays vary over these axes of a mesh, and over those that any of them does."""
    if hasattr(jax, "typeof"):
        return _vary(arrays, tuple(sorted({*axes, *_axes(arrays)})))
    return arrays


def _varying_alike(arrays: dict) -> dict:
    """Let arrays of one call vary over the same axes, as a custom call demands."""
    return _vary(arrays, _axes(arrays))
