"""The delta rule in PyTorch, with gradients: an autograd.Function, on the CPU and on CUDA.

cupy_delta does not know PyTorch. Tensors lend their memory to arrays of NumPy or CuPy and take
that of the results, by DLPack, which copies nothing. On CUDA the kernels run on PyTorch's current
stream: both libraries then order their work, and reuse their memory, by the same stream.

`delta_rule` below is all that it takes. The rest is an example: a layer that learns to recall what
was last stored under a key, from tokens that hold a key, a value and a query.

Run ``python examples/torch_autograd.py``, with ``--device cuda`` on a GPU; it needs PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import cupy_delta


def delta_rule(q, k, v, beta, g=None, initial_state=None, **options):
    """Apply `cupy_delta.chunk_delta_rule` to tensors; returns o and the final states.

    Arguments and options are those of the library, without ``out``; ``cu_seqlens`` is an array of
    the host or, on CUDA, of CuPy.
    """
    return DeltaRule.apply(q, k, v, beta, g, initial_state, options)


class DeltaRule(torch.autograd.Function):
    """The operator and its exact backward."""

    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, options):
        inputs = q, k, v, beta, g, initial_state
        with on_stream_of(q):
            *arrays, state = map(as_array, inputs)
            result = cupy_delta.chunk_delta_rule_fwd(*arrays, initial_state=state, **options)
            o, final_state = as_tensor(result.o), as_tensor(result.final_state)
        # The residuals use the memory of the inputs; saved, PyTorch sees it if one is changed.
        ctx.residuals = result.residuals
        ctx.save_for_backward(*inputs)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal_state):
        _ = ctx.saved_tensors  # an error if an input was changed in place
        with on_stream_of(do):
            gradients = cupy_delta.chunk_delta_rule_bwd(
                ctx.residuals, as_array(do), as_array(dfinal_state)
            )
            return *map(as_tensor, gradients), None


@contextmanager
def on_stream_of(x: torch.Tensor):
    """Let CuPy work on PyTorch's current stream of the device where a tensor lives."""
    if not x.is_cuda:
        yield
        return
    import cupy

    stream = torch.cuda.current_stream(x.device)
    with cupy.cuda.Device(x.device.index), cupy.cuda.Stream.from_external(stream):
        yield


def as_array(x: torch.Tensor | None):
    """Return the array of NumPy or CuPy that has a tensor's memory."""
    if x is None:
        return None
    x = x.detach().contiguous()
    if x.is_cuda:
        import cupy

        return cupy.from_dlpack(x)
    if x.dtype == torch.bfloat16:  # which NumPy knows by ml_dtypes alone
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.from_dlpack(x)


def as_tensor(x) -> torch.Tensor | None:
    """Return the tensor that has an array's memory."""
    if x is None:
        return None
    if isinstance(x, np.ndarray) and x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


# ---- an example ----------------------------------------------------------------------------------

KEYS, VALUES, BATCH, TOKENS = 8, 8, 16, 32


class Recall(nn.Module):
    """One head of the delta rule between linear maps."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(KEYS + VALUES + KEYS, 2 * width + VALUES, bias=False)
        self.strength = nn.Linear(KEYS + VALUES + KEYS, 1)
        self.out = nn.Linear(VALUES, VALUES, bias=False)
        self.sizes = width, width, VALUES

    def forward(self, x):
        q, k, v = (part.unsqueeze(2) for part in self.qkv(x).split(self.sizes, dim=-1))
        o, _ = delta_rule(q, k, v, self.strength(x).sigmoid(), qk_l2norm=True, scale=1.0)
        return self.out(o.squeeze(2))


def episode(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B, T, ...) and, for each, the value that its query's key has by then."""
    keys, queries = torch.randint(KEYS, (2, BATCH, TOKENS), generator=generator)
    values = torch.randn(BATCH, TOKENS, VALUES, generator=generator)
    held, answers, rows = torch.zeros(BATCH, KEYS, VALUES), [], torch.arange(BATCH)
    for t in range(TOKENS):
        held[rows, keys[:, t]] = values[:, t]
        answers.append(held[rows, queries[:, t]].clone())
    one_hot = nn.functional.one_hot
    tokens = torch.cat([one_hot(keys, KEYS), values, one_hot(queries, KEYS)], dim=-1)
    return tokens, torch.stack(answers, dim=1)


def train(steps: int, device: str) -> list[float]:
    """Train the layer and return the loss of every step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Recall(width=16).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens, answers = (x.to(device) for x in episode(generator))
        loss = nn.functional.mse_loss(model(tokens), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The delta rule in PyTorch: learn to recall.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU", file=sys.stderr)
        return 2
    if args.steps < 1:
        print(f"--steps: expected at least 1, got {args.steps}", file=sys.stderr)
        return 2
    losses = train(args.steps, args.device)
    shown = max(1, len(losses) // 10)
    for step in range(0, len(losses), shown):
        print(f"step {step:4d}: loss {losses[step]:.4f}")
    first, last = losses[0], sum(losses[-shown:]) / shown
    print(f"from {first:.3f} to {last:.4f}")
    return 0 if last < first / 4 else 1


if __name__ == "__main__":
    sys.exit(main())
