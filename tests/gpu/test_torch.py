"""examples/torch_autograd.py on a GPU: the CPU's gradients, on whatever stream is current."""

import numpy as np
import pytest
from helpers import make_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("side_stream", [False, True])
def test_gradients_are_those_of_the_cpu(side_stream):
    torch = pytest.importorskip("torch")
    from torch_autograd import delta_rule

    args, _ = make_inputs(300, B=2, H=2, G=2, K=64, V=64, dtype=np.float32)
    found = {}
    for device in ("cpu", "cuda"):
        inputs = [torch.from_numpy(x).to(device).requires_grad_() for x in args[:4]]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            o, state = delta_rule(*inputs, qk_l2norm=True)
            (o.square().sum() + state.sum()).backward()
        stream.synchronize()
        found[device] = [x.grad.cpu() for x in inputs]
    for x, y in zip(found["cuda"], found["cpu"], strict=True):
        assert torch.linalg.norm(x - y) < 1e-5 * torch.linalg.norm(y)


def test_the_layer_learns_to_recall():
    pytest.importorskip("torch")
    from torch_autograd import main

    assert main(["--steps", "150", "--device", "cuda"]) == 0
