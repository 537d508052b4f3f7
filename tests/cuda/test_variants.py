"""Kernels that are compiled ahead are those that calls of these shapes launch; no GPU needed."""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs
from raw import raw_gate

import cupy_delta as cd
from cupy_delta import dispatch
from cupy_delta.cuda import operators
from cupy_delta.cuda.architectures import ARCHITECTURES
from cupy_delta.cuda.variants import STEPS, launches_of

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


class Recorder:
    """A device that keeps which kernels it is to compile, and launches nothing."""

    def __init__(self, facts):
        self.facts, self.kernels = facts, set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def empty(self, shape, dtype, name):
        return np.zeros(shape, dtype)

    zeros = empty

    def bring(self, x, name, dtype):
        return x

    def target(self, x, name):
        return x

    def prepare(self, launches):
        self.kernels |= {(launch.file, launch.defines) for launch in launches}

    def launch(self, launch, arrays):
        pass


@pytest.fixture
def recorder(monkeypatch):
    def on(architecture):
        device = Recorder(ARCHITECTURES[architecture])
        monkeypatch.setattr(operators, "device_of", lambda x: device)
        return device

    monkeypatch.setitem(dispatch.BACKENDS, "numpy", "cupy_delta.cuda")
    return on


CASES = [
    dict(dtype=BF16, T=100),
    dict(dtype=BF16, T=100, gate="scalar", layout="vk"),
    dict(dtype=BF16, T=100, gate="scalar", formula="softplus"),
    dict(dtype=F32, T=100, gate="channel", formula="sigmoid"),
    dict(dtype=BF16, T=40000),
    dict(dtype=BF16, T=100, cu_seqlens=[0, 20, 100]),
    dict(dtype=F32, T=100, initial=True),
    dict(dtype=F32, T=20000, G=2),
    dict(dtype=BF16, T=100, pool="bfloat16", every=64, initial=True),
    dict(dtype=BF16, T=100, pool="float16", gate="channel", initial=True),
    dict(dtype=BF16, T=9000, K=128, V=128, G=8, gate="channel"),
]


def run(passes, args, kw, pool=None, every=None, **options):
    if passes == "forward":
        cd.chunk_delta_rule(*args, **kw, **options)
    elif passes == "prefill":
        state = kw["initial_state"]
        state = state if pool is None else state.astype(getattr(ml_dtypes, pool, pool))
        kw = kw | dict(state=state, initial_state=None, checkpoint_every=every)
        cd.chunk_delta_rule(*args, **kw, **options)
    elif passes == "recurrent":
        cd.recurrent_delta_rule(*args, **kw, **options)
    else:
        forward = cd.chunk_delta_rule_fwd(*args, **kw, **options)
        cd.chunk_delta_rule_bwd(forward.residuals, np.zeros_like(args[2]))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize("passes", ["forward", "prefill", "backward", "recurrent"])
def test_calls_launch_what_was_planned_ahead(recorder, architecture, case, qk_l2norm, passes):
    device, sizes = recorder(architecture), dict(H=2, G=1, K=64, V=64) | case
    formula = sizes.pop("formula", None)
    stored = {name: sizes.pop(name, None) for name in ("pool", "every")}
    args, kw = make_inputs(**sizes | dict(initial=passes == "prefill" or "initial" in case))
    if formula is not None:
        gate, dtype, rng = sizes["gate"], sizes["dtype"], np.random.default_rng(0)
        bias = "channel" if gate == "channel" else "head"
        args[3] = cd.SigmoidBeta(args[3])
        args[4] = raw_gate(rng, formula, gate, bias, 1, sizes["T"], 2, 64, dtype)
    cu = sizes.get("cu_seqlens")
    options = dict(
        dtype=sizes["dtype"].name,
        K=sizes["K"],
        V=sizes["V"],
        B=1 if cu is None else len(cu) - 1,
        T=sizes["T"],
        H=2,
        HV=2 * sizes["G"],
        gate=sizes.get("gate", False),
        narrow_gate=sizes["dtype"] == BF16,
        raw=formula,
        varlen=cu is not None,
        qk_l2norm=qk_l2norm,
        state_layout=sizes.get("layout", "kv"),
        checkpoint_every=stored["every"],
        pool_dtype=stored["pool"],
    )
    try:
        ahead = launches_of(device.facts, (passes,), **options)
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            run(passes, args, kw, **stored, qk_l2norm=qk_l2norm)
        return
    run(passes, args, kw, **stored, qk_l2norm=qk_l2norm)
    assert device.kernels == {(launch.file, launch.defines) for launch in ahead}
    assert device.kernels


@pytest.mark.parametrize("T", [1, 4, 8])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("pool", ["float32", "bfloat16"])
@pytest.mark.parametrize("accepting", [False, True])
def test_steps_launch_what_was_planned_ahead(recorder, T, layout, pool, accepting):
    device = recorder("sm_90")
    args, kw = make_inputs(T, B=3, H=2, G=2, K=64, V=32, layout=layout, dtype=BF16, initial=True)
    state = kw["initial_state"].astype(getattr(ml_dtypes, pool, pool))
    accepted = np.zeros(3, np.int64) if accepting else None
    cd.delta_rule_step(*args, state=state, accepted=accepted, state_layout=layout)
    sizes = dict(
        dtype="bfloat16", K=64, V=32, B=3, T=min(T, STEPS[-1]), H=2, HV=4, state_layout=layout
    )
    ahead = launches_of(device.facts, ("step",), **sizes, pool_dtype=pool, accepting=accepting)
    assert device.kernels == {(launch.file, launch.defines) for launch in ahead}
