"""Check the operators on this machine against the float64 token loop.

Every case draws random inputs in its dtype and compares with the float64 token loop (for
gradients: its exact adjoint) on the same values. The error is the largest difference over the
largest exact value. float64 must agree to 1e-12; the other bounds allow for operands and results
rounded to the dtype in every product of a chunk, as tensor cores do, with float32 accumulation.
Correlated keys with beta = 2 multiply what is rounded, and have bounds of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..arrays import FLOAT_DTYPES
from ..building_blocks import chunk_output, sequence_transfer, state_pass, wy_factors
from ..call import Call, Gate
from ..operators import (
    chunk_delta_rule,
    chunk_delta_rule_bwd,
    chunk_delta_rule_fwd,
    delta_rule_step,
    recurrent_delta_rule,
)
from ..problem import operator_problem
from ..reference.adjoint import recurrent_delta_rule_bwd
from .console import (
    NOT_FINITE,
    Device,
    add_device,
    add_seed,
    not_finite,
    print_table,
    progress,
    random_inputs,
)
from .output import check_json, text_beside, write_json

BOUNDS = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Case:
    """One comparison: an operator, its options, and the dtypes it runs in."""

    name: str
    operator: str
    T: int = 130
    sizes: dict = field(default_factory=dict)
    gate: Gate | None = None
    beta: tuple = (0.0, 1.0)
    correlation: float = 0.0
    beta_per_value: bool = False
    cu_seqlens: tuple | None = None
    options: dict = field(default_factory=dict)
    bounds: dict = field(default_factory=dict)  # of its own, by dtype

    def bound(self, dtype: str) -> float:
        return self.bounds.get(dtype, BOUNDS[dtype])


CASES = (
    Case("chunk", "chunk", sizes=dict(B=2, H=2, HV=2)),
    Case("chunk, K != V", "chunk", sizes=dict(K=40, V=96)),
    Case("chunk, grouped value heads", "chunk", sizes=dict(H=2, HV=4)),
    Case("chunk, chunks of 16", "chunk", options=dict(chunk_size=16)),
    Case("chunk, one token", "chunk", T=1),
    Case("chunk, sequences end to end", "chunk", cu_seqlens=(0, 0, 1, 65, 130)),
    Case(
        "chunk, beta = 2, correlated keys",
        "chunk",
        beta=(2.0, 2.0),
        correlation=0.9,
        bounds=dict(float32=5e-5, float16=1e-2, bfloat16=8e-2),
    ),
    Case("chunk, l2norm, vk states", "chunk", options=dict(qk_l2norm=True, state_layout="vk")),
    Case("chunk, scalar gate", "chunk", gate="scalar"),
    Case("chunk, channel gate", "chunk", gate="channel"),
    Case("chunk, slots of a pool", "indexed chunk", sizes=dict(B=3, H=2, HV=4)),
    Case("recurrent", "recurrent", sizes=dict(H=2, HV=4), gate="scalar"),
    Case("recurrent, beta per value", "recurrent", beta_per_value=True),
    Case("step", "step", T=4, sizes=dict(B=3, H=2, HV=4)),
    Case("step, indexed pool", "indexed step", T=2, sizes=dict(B=3, H=2, HV=4)),
    Case("building blocks", "blocks", sizes=dict(H=2, HV=4)),
    Case("building blocks, sequences", "blocks", cu_seqlens=(0, 0, 1, 65, 130)),
    Case("building blocks, scalar gate", "blocks", gate="scalar", options=dict(qk_l2norm=True)),
    Case("building blocks, channel gate", "blocks", gate="channel"),
    Case("transfer", "transfer", sizes=dict(H=2, HV=4)),
    Case("transfer, scalar gate", "transfer", gate="scalar"),
    Case("transfer, channel gate", "transfer", gate="channel"),
    Case("gradients", "gradients", sizes=dict(H=2, HV=4)),
    Case("gradients, sequences end to end", "gradients", cu_seqlens=(0, 0, 1, 65, 130)),
    Case("gradients, scalar gate", "gradients", gate="scalar"),
    Case("gradients, channel gate", "gradients", gate="channel"),
)


def add_arguments(parser) -> None:
    add_device(parser)
    add_seed(parser)
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON; - is the output")


def run_command(args) -> int:
    check_json(args.json)
    device, shown = Device(args.device), text_beside(args.json)
    work = [(case, dtype) for case in CASES for dtype in BOUNDS]
    rows, diverged = [], []
    for case, dtype in progress(work, "checking"):
        if device.name == "gpu" and _only_on_cpu(case, dtype):
            rows.append([case.name, dtype, "-", "-", "not on this device"])
            continue
        error, where = _error(case, dtype, device, args.seed)
        bound = case.bound(dtype)
        verdict = "ok" if error <= bound else "FAILED"
        if where:
            verdict = "NOT FINITE"
            diverged.append(f"{case.name}, {dtype}: not finite: {where}")
        rows.append([case.name, dtype, f"{error:.1e}", f"{bound:.0e}", verdict])
    print_table(["case", "dtype", "error", "bound", "verdict"], rows, shown)
    for line in diverged:
        print(line, file=shown)
    ok = sum(row[-1] == "ok" for row in rows)
    ran = sum(row[-1] != "not on this device" for row in rows)
    print(f"{ok} of {ran} cases within their bounds on the {device.name}", file=shown)
    if args.json:
        keys = ("case", "dtype", "error", "bound", "verdict")
        write_json(args.json, [dict(zip(keys, row, strict=True)) for row in rows])
    if diverged:
        return NOT_FINITE
    return 0 if ok == ran else 1


OPERATIONS = {
    "chunk": ("forward",),
    "indexed chunk": ("forward",),
    "recurrent": ("recurrent",),
    "step": ("step",),
    "indexed step": ("step",),
    "blocks": ("wy_factors", "state_pass", "chunk_output"),
    "transfer": ("transfer",),
    "gradients": ("training", "backward"),
}


def _only_on_cpu(case: Case, dtype: str) -> bool:
    """Tell what CuPy arrays refuse; anything else that fails there is a defect."""
    from ..cuda.families import refusal

    call = Call(
        dtype=FLOAT_DTYPES[dtype], gate=case.gate, chunk_size=case.options.get("chunk_size")
    )
    return any(refusal(operation, call) for operation in OPERATIONS[case.operator])


def _error(case: Case, dtype: str, device: Device, seed: int) -> tuple[float, str | None]:
    """Return the error of one case, and which of its results are not finite."""
    arrays = _draw(case, dtype, np.random.default_rng(seed))
    moved = {name: device.to(x) for name, x in arrays.items()}
    results = {name: device.back(x) for name, x in _results(case, moved).items()}
    wide = {n: x.astype(np.float64) if _is_float(x) else x for n, x in arrays.items()}
    exact = _exact(case, wide)
    error = max(_difference(x, y) for x, y in zip(results.values(), exact, strict=True))
    return error, not_finite({n: x for n, x in results.items() if x is not None})


def _draw(case: Case, dtype: str, rng) -> dict:
    """Draw the arrays of a case by name; None where it has none."""
    q, k, v, beta = random_inputs(rng, dtype, case.T, beta=case.beta, **case.sizes)
    if case.correlation:
        common = rng.standard_normal(k.shape[-1])
        mixed = np.sqrt(case.correlation) * common / np.linalg.norm(common)
        mixed = mixed + np.sqrt(1 - case.correlation) * k.astype(np.float64)
        k = (mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)).astype(k.dtype)
    if case.beta_per_value:
        beta = rng.uniform(*case.beta, v.shape).astype(beta.dtype)
    states = FLOAT_DTYPES["float64" if dtype == "float64" else "float32"]
    g = None
    if case.gate:
        shape = (*beta.shape, k.shape[-1]) if case.gate == "channel" else beta.shape
        g = -rng.exponential(0.1, shape).astype(states)
    cu = None if case.cu_seqlens is None else np.array(case.cu_seqlens)
    N = q.shape[0] if cu is None else len(cu) - 1
    K, (HV, V) = q.shape[-1], v.shape[2:]
    shape = (N, HV, V, K) if case.options.get("state_layout") == "vk" else (N, HV, K, V)
    state, dstate = (rng.standard_normal(shape).astype(states) for _ in range(2))
    do = rng.standard_normal(v.shape).astype(v.dtype)
    pool = rng.standard_normal((q.shape[0] + 2, *shape[1:])).astype(k.dtype)
    indices = np.array([q.shape[0] + 1, -1, *range(q.shape[0] - 2)])[: q.shape[0]]
    names = dict(q=q, k=k, v=v, beta=beta, g=g, cu_seqlens=cu, state=state)
    return names | dict(do=do, dstate=dstate, pool=pool, indices=indices)


def _results(case: Case, a: dict) -> dict:
    """Run the operator of a case on its arrays; return its results by name."""
    inputs = [a[name] for name in ("q", "k", "v", "beta", "g")]
    options = case.options | dict(initial_state=a["state"], cu_seqlens=a["cu_seqlens"])
    if case.operator == "chunk":
        return chunk_delta_rule(*inputs, **options)._asdict()
    if case.operator == "recurrent":
        return recurrent_delta_rule(*inputs, **options)._asdict()
    if case.operator == "step":
        state = a["state"].copy()
        return dict(o=delta_rule_step(*inputs, state=state), state=state)
    if case.operator.startswith("indexed"):
        pool = a["pool"].copy()
        on_pool = dict(state=pool, state_indices=a["indices"])
        if case.operator == "indexed step":
            return dict(o=delta_rule_step(*inputs, **on_pool), state=pool)
        return dict(o=chunk_delta_rule(*inputs, **on_pool).o, state=pool)
    sequences = dict(cu_seqlens=a["cu_seqlens"])
    if case.operator == "blocks":
        q, k, v, beta, g = inputs
        pieces = case.options | sequences
        w, u, _ = wy_factors(k, v, beta, g, **pieces)
        states, v_new, final = state_pass(k, w, u, g, initial_state=a["state"], **pieces)
        return dict(o=chunk_output(q, k, v_new, states, g, **pieces), final_state=final)
    if case.operator == "transfer":
        final = sequence_transfer(*inputs[1:], **sequences).apply(a["state"])
        return dict(final_state=final)
    forward = chunk_delta_rule_fwd(*inputs, **options)
    return chunk_delta_rule_bwd(forward.residuals, a["do"], a["dstate"])._asdict()


def _exact(case: Case, a: dict) -> list:
    """The same from the float64 token loop on NumPy arrays."""
    inputs = [a[name] for name in ("q", "k", "v", "beta", "g")]
    options = case.options | dict(initial_state=a["state"], cu_seqlens=a["cu_seqlens"])
    options.pop("chunk_size", None)
    if case.operator == "gradients":
        options = dict(scale=None, qk_l2norm=False, state_layout="kv", out=None) | options
        problem = operator_problem(*inputs, **options)
        return list(recurrent_delta_rule_bwd(problem, a["do"], a["dstate"]))
    if case.operator == "indexed step":
        used = a["indices"] >= 0
        o, pool = np.zeros_like(a["v"]), a["pool"].copy()
        inputs = [None if x is None else x[used] for x in inputs]
        initial = pool[a["indices"][used]]
        o[used], pool[a["indices"][used]] = recurrent_delta_rule(*inputs, initial_state=initial)
        return [o, pool]
    if case.operator == "indexed chunk":
        used, pool = a["indices"] >= 0, a["pool"].copy()
        initial = np.where(used[:, None, None, None], pool[a["indices"]], 0)
        o, final_state = recurrent_delta_rule(*inputs, initial_state=initial)
        pool[a["indices"][used]] = final_state[used]
        return [o, pool]
    o, final_state = recurrent_delta_rule(*inputs, **options)
    return [final_state] if case.operator == "transfer" else [o, final_state]


def _is_float(x) -> bool:
    return x is not None and x.dtype.name in FLOAT_DTYPES


def _difference(x, y) -> float:
    if x is None or y.size == 0:
        return 0.0 if (x is None) == (y is None) else np.inf
    worst = np.max(np.abs(x.astype(np.float64) - y)) / max(np.max(np.abs(y)), 1e-30)
    return float(np.inf if np.isnan(worst) else worst)
