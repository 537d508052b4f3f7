"""What only a real GPU can show. Run there with: python -m pytest -m gpu tests/gpu

The operators' own table runs on it with: python -m pytest --on-gpu tests/cuda
"""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd

pytestmark = pytest.mark.gpu


def inputs(cupy, T=200, dtype=ml_dtypes.bfloat16, **sizes):
    args, kw = make_inputs(**(dict(T=T, H=2, G=2, K=64, V=64, dtype=dtype) | sizes))
    args = [None if x is None else cupy.asarray(x) for x in args]
    return args, {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in kw.items()}


def same(cupy, x, y):
    return bool((x.view(cupy.uint8) == y.view(cupy.uint8)).all())


def test_a_hundred_runs_give_the_same_bits(cupy):
    args, kw = inputs(cupy, T=1000)
    first = cd.chunk_delta_rule_fwd(*args, **kw)
    do = cupy.ones_like(first.o)
    gradients = cd.chunk_delta_rule_bwd(first.residuals, do)
    for _ in range(100):
        again = cd.chunk_delta_rule_fwd(*args, **kw)
        assert same(cupy, again.o, first.o)
        assert same(cupy, again.final_state, first.final_state)
        for x, y in zip(cd.chunk_delta_rule_bwd(again.residuals, do), gradients, strict=True):
            assert x is None or same(cupy, x, y)


def test_raw_gates_in_a_graph_give_the_same_bits(cupy):
    """Forward and gradients, of logits in 16 bits, after the logits have changed in place."""
    (q, k, v, _, _), _ = inputs(cupy, T=1000)
    rng = cupy.random.default_rng(0)
    a, b = (rng.standard_normal(v.shape[:3], "float32").astype(v.dtype) for _ in range(2))
    A_log, dt_bias = (rng.standard_normal(v.shape[2], "float32") for _ in range(2))
    beta, gate = cd.SigmoidBeta(b, scale=2), cd.SoftplusGate(a, A_log, dt_bias)
    out, do = cupy.empty_like(v), cupy.ones_like(v)

    def call():
        forward = cd.chunk_delta_rule_fwd(q, k, v, beta, gate, qk_l2norm=True, out=out)
        gradients = cd.chunk_delta_rule_bwd(forward.residuals, do)
        return (out, *gradients[:3], *gradients.beta, *gradients.g)

    stream, workspace = cupy.cuda.Stream(non_blocking=True), cd.Workspace()
    cupy.cuda.Device().synchronize()
    with stream, workspace:
        call()
        held = workspace.nbytes
        stream.synchronize()
        stream.begin_capture()
        found = call()
        graph = stream.end_capture()
    assert workspace.nbytes == held > 0
    a[...] = a[:, ::-1].copy()
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    replayed = [x.copy() for x in found]
    for x, y in zip(replayed, call(), strict=True):
        assert same(cupy, x, y)


def test_graph_capture_and_replay(cupy):
    args, kw = inputs(cupy)
    out = cupy.empty_like(args[2])
    expected = cd.chunk_delta_rule(*args, **kw).o
    stream, workspace = cupy.cuda.Stream(non_blocking=True), cd.Workspace()
    with stream, workspace:
        cd.chunk_delta_rule(*args, **kw, out=out)
        held = workspace.nbytes
        stream.synchronize()
        stream.begin_capture()
        cd.chunk_delta_rule(*args, **kw, out=out)
        graph = stream.end_capture()
    assert workspace.nbytes == held > 0
    for factor in (1, 2):
        changed = args[2] * factor
        args[2][...] = changed
        out.fill(float("nan"))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert same(cupy, out, cd.chunk_delta_rule(*args, **kw).o)
    assert not same(cupy, out, expected)


def test_two_streams_do_not_disturb_each_other(cupy):
    problems = [inputs(cupy, T=2000, seed=seed) for seed in range(2)]
    expected = [cd.chunk_delta_rule(*args, **kw).o for args, kw in problems]
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    results = [[], []]
    for _ in range(5):
        for i, (args, kw) in enumerate(problems):
            with streams[i]:
                results[i].append(cd.chunk_delta_rule(*args, **kw).o)
    for stream in streams:
        stream.synchronize()
    for found, x in zip(results, expected, strict=True):
        assert all(same(cupy, y, x) for y in found)


def test_more_than_two_to_the_31_elements(cupy):
    B, T, H, D = 9, 32768, 64, 128
    assert B * T * H * D > 2**31
    one, kw = inputs(cupy, T=T, H=1, G=1, K=D, V=D)
    q, k, v, beta = (cupy.broadcast_to(x, (B, T, H, *x.shape[3:])).copy() for x in one[:4])
    o, final = cd.chunk_delta_rule(q, k, v, beta)
    assert same(cupy, o[B - 1, :, H - 1].copy(), o[0, :, 0].copy())
    assert same(cupy, final[B - 1, H - 1].copy(), final[0, 0].copy())
    # One head alone may be cut into segments: the same numbers, not the same bits.
    expected = cd.chunk_delta_rule(*one, **kw)
    for x, y in ((o[0, :, 0], expected.o[0, :, 0]), (final[0, 0], expected.final_state[0, 0])):
        x, y = x.astype(cupy.float32), y.astype(cupy.float32)
        assert cupy.linalg.norm(x - y) < 0.02 * cupy.linalg.norm(y)


def test_dlpack_with_torch(cupy):
    torch = pytest.importorskip("torch")
    args, kw = inputs(cupy)
    tensors = [torch.from_dlpack(x) for x in args[:4]]
    back = [cupy.from_dlpack(x.detach()) for x in tensors]
    assert back[0].dtype == np.dtype(ml_dtypes.bfloat16)
    o = cd.chunk_delta_rule(*back, **kw).o
    assert same(cupy, o, cd.chunk_delta_rule(*args, **kw).o)
    assert torch.from_dlpack(o).dtype == torch.bfloat16


def test_dlpack_with_jax(cupy):
    jax = pytest.importorskip("jax")
    args, kw = inputs(cupy, dtype=np.float32)
    moved = [jax.dlpack.from_dlpack(x) for x in args[:4]]
    back = [cupy.from_dlpack(x) for x in moved]
    assert same(cupy, cd.chunk_delta_rule(*back, **kw).o, cd.chunk_delta_rule(*args, **kw).o)


def test_device_side_cu_seqlens_and_indices(cupy):
    args, kw = inputs(cupy, G=1, cu_seqlens=[0, 0, 1, 70, 200], initial=True)
    host = kw | {"cu_seqlens": kw["cu_seqlens"].get()}
    expected = cd.chunk_delta_rule(*args, **host)
    for index in (np.int32, np.int64):
        given = kw | {"cu_seqlens": kw["cu_seqlens"].astype(index)}
        assert same(cupy, cd.chunk_delta_rule(*args, **given).o, expected.o)
    pool = cupy.zeros((4, 2, 64, 64), cupy.float32)
    step = [x[:, :3].repeat(3, axis=0) for x in args[:4]]
    beyond = cupy.asarray([2, -1, 99])
    o = cd.delta_rule_step(*step, state=pool, state_indices=beyond)
    assert not bool(o[1:].astype(cupy.float32).any())
    assert bool(pool[2].any()) and not bool(pool[[0, 1, 3]].any())


def test_strided_and_unaligned_arrays(cupy):
    args, kw = inputs(cupy)
    expected = cd.chunk_delta_rule(*args, **kw).o
    strided = [cupy.asfortranarray(x) for x in args[:4]]
    assert same(cupy, cd.chunk_delta_rule(*strided, **kw).o, expected)
    shifted = []
    for x in args[:4]:
        memory = cupy.empty(x.size + 1, x.dtype)
        memory[1:] = x.ravel()
        shifted.append(memory[1:].reshape(x.shape))
    out = cupy.empty(expected.size + 1, expected.dtype)[1:].reshape(expected.shape)
    assert out.data.ptr % 16
    assert cd.chunk_delta_rule(*shifted, **kw, out=out).o is out
    assert same(cupy, out, expected)


def test_mixing_with_numpy_is_refused(cupy):
    args, kw = inputs(cupy)
    with pytest.raises(TypeError, match="NumPy and CuPy arrays do not mix"):
        cd.chunk_delta_rule(args[0], args[1].get(), *args[2:], **kw)


def test_transfers_on_the_gpu(cupy):
    args, _ = inputs(cupy, dtype=np.float32, G=1)
    _, k, v, beta, _ = args
    first = cd.sequence_transfer(k[:, :70], v[:, :70], beta[:, :70])
    rest = cd.sequence_transfer(k[:, 70:], v[:, 70:], beta[:, 70:])
    whole = cd.sequence_transfer(k, v, beta)
    assert float(abs(first.then(rest).h - whole.h).max()) < 1e-5
    final = cd.chunk_delta_rule(k, k, v, beta).final_state
    assert float(abs(whole.apply(cupy.zeros_like(final)) - final).max()) < 1e-5
