"""The example's autograd.Function: PyTorch's own check of gradients, and a layer that learns."""

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import make_inputs
from torch_autograd import as_array, as_tensor, delta_rule, main

import cupy_delta as cd

torch.set_num_threads(1)  # for what is as small as here

CASES = {
    "plain": dict(T=5, H=1, K=3, V=2),
    "a scalar gate, grouped, normalised": dict(T=9, B=2, H=1, G=2, K=3, V=2, gate="scalar"),
    "a gate per channel, states": dict(T=6, K=2, V=3, gate="channel", initial=True, layout="vk"),
    "ragged": dict(T=8, K=3, V=2, cu_seqlens=[0, 0, 5, 8], initial=True),
}


def tensors(**case):
    """Return the tensors of a call, which require gradients, and its options."""
    args, kwargs = make_inputs(**case)
    found = [*args, kwargs.pop("initial_state")]
    options = {name: x for name, x in kwargs.items() if x is not None}
    return [None if x is None else as_tensor(x).requires_grad_() for x in found], options


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    inputs, options = tensors(**CASES[case])
    options |= dict(qk_l2norm="normalised" in case, chunk_size=4)
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, **options), inputs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_outputs_are_the_librarys_and_share_their_memory(dtype):
    args, _ = make_inputs(20, H=2, dtype=dtype)
    inputs = [None if x is None else as_tensor(x) for x in args]
    for x, tensor in zip(args, inputs, strict=True):
        assert x is None or tensor.data_ptr() == x.ctypes.data
        assert x is None or as_array(tensor).ctypes.data == x.ctypes.data
    o, state = delta_rule(*inputs, qk_l2norm=True)
    expected = cd.chunk_delta_rule(*args, qk_l2norm=True)
    assert as_array(o).dtype == expected.o.dtype
    assert as_array(o).tobytes() == expected.o.tobytes()
    assert as_array(state).tobytes() == expected.final_state.tobytes()


def test_strided_tensors_and_gradients():
    (q, k, v, beta, *_), _ = tensors(T=10, H=2, dtype=np.float32)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not turned[0].is_contiguous()
    strided = [x.requires_grad_() for x in turned]
    for inputs in ((q, k, v), strided):
        o, _ = delta_rule(*inputs, beta)
        o.sum().backward()  # whose gradient is one number, expanded
    for x, y in zip((q, k, v), strided, strict=True):
        assert torch.equal(x.grad, y.grad)


def test_an_input_that_was_changed_is_noticed():
    (q, k, v, beta, *_), _ = tensors(T=10)
    w = v * 1.0
    o, _ = delta_rule(q, k, w, beta)
    w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_errors_are_the_librarys():
    (q, k, v, beta, *_), _ = tensors(T=10, K=5)
    with pytest.raises(ValueError, match=r"k: expected \(B, T, H, K\)"):
        delta_rule(q, k[..., :3], v, beta)


def test_the_layer_learns_to_recall(capsys):
    assert main(["--steps", "130"]) == 0
    assert "step    0: loss 0." in capsys.readouterr().out
