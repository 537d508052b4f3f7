"""The contestants: each takes the same arrays and runs one forward or one backward.

A contestant is built from `Inputs` (NumPy or CuPy arrays; CuPy's are shared with PyTorch by DLPack)
on the current stream. It imports its library when it is built, never before. Every forward writes
outputs and final states. The backward is timed alone, with what the forward kept.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from itertools import accumulate

import numpy as np

from .rows import Inputs, Row


class Ours:
    """cupy_delta's operators."""

    name = "cupy_delta"
    distribution = "cupy_delta"
    backward_too = True
    notes = ""

    def __init__(self, inputs: Inputs):
        import cupy

        import cupy_delta

        self.library, self.workspace = cupy_delta, cupy_delta.Workspace()
        x = inputs
        given = (x.q, x.k, x.v, x.beta, x.g)
        self.arrays = [None if a is None else cupy.asarray(a) for a in given]
        self.do = cupy.asarray(x.do)
        cu_seqlens = None if x.cu_seqlens is None else cupy.asarray(x.cu_seqlens)
        self.options = {"cu_seqlens": cu_seqlens, "out": cupy.empty_like(self.arrays[2])}
        self.residuals = None

    @staticmethod
    def refusal(row: Row, passes: str) -> str | None:
        return None if max(row.K, row.V) <= 256 else "head sizes up to 256"

    def forward(self):
        return self.library.chunk_delta_rule(*self.arrays, **self.options).o

    def prepare_backward(self) -> None:
        self.residuals = self.library.chunk_delta_rule_fwd(*self.arrays, **self.options).residuals

    def backward(self):
        gradients = self.library.chunk_delta_rule_bwd(self.residuals, self.do)
        return gradients[: 4 + (self.arrays[4] is not None)]

    @staticmethod
    def graph(copies: list, passes: str, stream):
        """Capture one call per copy, each with buffers of its own; return what replays them.

        It keeps the copies: a graph holds none of the memory that it reads and writes.
        """

        def calls():
            for copy in copies:
                with copy.workspace:
                    getattr(copy, passes)()

        calls()  # allocates the buffers
        stream.synchronize()
        stream.begin_capture()
        try:
            calls()
        except Exception:
            with suppress(Exception):  # what is left of it
                stream.end_capture()
            raise
        kept = [stream.end_capture(), copies]
        return lambda: kept[0].launch(stream)

    @staticmethod
    def host(x) -> np.ndarray:
        return x.get().astype(np.float64)

    @staticmethod
    def float32(x):
        """As a CuPy array of float32."""
        return x.astype(np.float32)

    @classmethod
    def gradients_host(cls, gradients, row: Row) -> list[np.ndarray]:
        """Of q, k, v, beta and, where there is one, the gate."""
        return [cls.host(x) for x in gradients]

    @staticmethod
    def synchronise() -> None:
        import cupy

        cupy.cuda.get_current_stream().synchronize()


class TorchContestant:
    """What contestants on PyTorch share; gradients by autograd, of q, k, v, beta and gates."""

    backward_too = True
    widths: tuple[int, ...] | None = None
    repeats_keys = False
    takes_gates = True
    per_channel = False  # gates per key channel, and nothing else

    def __init__(self, inputs: Inputs):
        import torch

        self.torch, self.row, self.rule = torch, inputs.row, self.load()
        x = inputs
        q, k, v, beta, do = (self.tensor(a) for a in (x.q, x.k, x.v, x.beta, x.do))
        if self.repeats_keys and self.row.HV > self.row.H:
            q, k = (a.repeat_interleave(self.row.HV // self.row.H, dim=2) for a in (q, k))
        self.plain, self.do = [q, k, v, beta], do
        self.cu_seqlens = None if x.cu_seqlens is None else self.tensor(x.cu_seqlens)
        self.g = None if x.g is None else self.tensor(x.g)
        self.leaves, self.o = [], None

    def tensor(self, array):
        if isinstance(array, np.ndarray):
            if array.dtype.name == "bfloat16":
                bits = self.torch.from_numpy(array.view(np.int16))
                return bits.view(self.torch.bfloat16).cuda()
            return self.torch.from_numpy(array).cuda()
        return self.torch.from_dlpack(array)

    @classmethod
    def refusal(cls, row: Row, passes: str) -> str | None:
        if passes == "backward" and not cls.backward_too:
            return "no backward"
        if row.gated and not cls.takes_gates:
            return "no gate"
        if row.per_channel != cls.per_channel:
            return "gates per key channel only" if cls.per_channel else "no gate per key channel"
        if cls.widths and not {row.K, row.V} <= set(cls.widths):
            return "head sizes " + ", ".join(map(str, cls.widths)) + " only"
        return None

    def call(self, tensors, final_state: bool):
        raise NotImplementedError

    def forward(self):
        with self.torch.no_grad():
            return self.call(self.plain, True)

    def prepare_backward(self) -> None:
        self.leaves = [x.detach().requires_grad_() for x in self.plain]
        if self.row.gated:
            self.g = self.g.detach().requires_grad_()
        self.o = self.call(self.leaves, False)
        self.leaves += [self.g] * self.row.gated

    def backward(self):
        return self.torch.autograd.grad(self.o, self.leaves, self.do, retain_graph=True)

    @staticmethod
    def graph(copies: list, passes: str, stream):
        """Capture one call per copy; copies and results stay alive, each with memory of its own."""
        import torch

        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=outer, capture_error_mode="thread_local"):
            results = [getattr(copy, passes)() for copy in copies]
        kept = [graph, results, copies]
        return lambda: kept[0].replay()

    @staticmethod
    def host(x) -> np.ndarray:
        return x.detach().double().cpu().numpy()

    @staticmethod
    def float32(x):
        import cupy

        return cupy.from_dlpack(x.detach().float())

    @classmethod
    def gradients_host(cls, gradients, row: Row) -> list[np.ndarray]:
        """Of q, k, v, beta and a row's gate; where keys were repeated, summed over the group."""
        found = [cls.host(x) for x in gradients]
        if cls.repeats_keys and row.HV > row.H:
            found[:2] = [x.reshape(*x.shape[:2], row.H, -1, row.K).sum(axis=3) for x in found[:2]]
        return found

    @staticmethod
    def synchronise() -> None:
        import torch

        torch.cuda.current_stream().synchronize()


class Fla(TorchContestant):
    name = "fla"
    distribution = "fla-core"
    repeats_keys = True
    takes_gates = False
    notes = (
        "flash-linear-attention, `chunk_delta_rule`; q and k repeated for the value heads of a "
        "group beforehand, so its backward leaves out the sum over the group"
    )

    @staticmethod
    def load():
        os.environ["FLA_FLASH_QLA"] = "0"
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule

    def call(self, tensors, final_state: bool):
        options = {"output_final_state": final_state, "cu_seqlens": self.cu_seqlens}
        return self.rule(*tensors, **options)[0]


class FlaGated(TorchContestant):
    name = "fla_gated"
    distribution = "fla-core"
    notes = (
        "flash-linear-attention, `chunk_gated_delta_rule`, g = 0 where no gate, its own kernels "
        "(FLA_FLASH_QLA=0)"
    )

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        if self.g is None:
            self.g = self.torch.zeros_like(self.plain[3])

    @staticmethod
    def load():
        os.environ["FLA_FLASH_QLA"] = "0"  # else it hands over to FlashQLA where that is installed
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule

    def call(self, tensors, final_state: bool):
        q, k, v, beta = tensors
        options = {"output_final_state": final_state, "cu_seqlens": self.cu_seqlens}
        return self.rule(q, k, v, self.g, beta, **options)[0]


class FlashQla(FlaGated):
    name = "flash_qla"
    distribution = "flash_qla"
    widths = (128,)
    notes = "FlashQLA, `chunk_gated_delta_rule`, g = 0 where no gate; head size 128 only"

    @staticmethod
    def load():
        from flash_qla import chunk_gated_delta_rule

        return chunk_gated_delta_rule


class FlashInfer(TorchContestant):
    name = "flashinfer"
    distribution = "flashinfer-python"
    backward_too = False
    widths = (128,)
    notes = (
        "FlashInfer, gated delta rule prefill into given outputs, g=None where no gate (its "
        "context-parallel path, which it takes on its own for few heads, then fills a gate of ones "
        "in every call); head size 128 and forward only"
    )

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        torch, row = self.torch, self.row
        self.plain = [x.reshape(row.tokens, *x.shape[2:]) for x in self.plain]
        ends = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int64, device="cuda")
        # Its gate is the decay itself, not its logarithm.
        self.decays = None if self.g is None else self.g.exp().reshape(row.tokens, row.HV)
        self.given = {
            "cu_seqlens": ends,
            "max_seqlen": max(row.lengths),
            "output": torch.empty_like(self.plain[2]),
            "output_state": torch.empty(
                (len(row.lengths), row.HV, row.V, row.K), dtype=torch.float32, device="cuda"
            ),
        }

    @staticmethod
    def load():
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        return chunk_gated_delta_rule

    def call(self, tensors, final_state: bool):
        q, k, v, beta = tensors
        o, _ = self.rule(q, k, v, self.decays, beta, output_final_state=True, **self.given)
        return o.reshape(*self.row.batch, self.row.HV, self.row.V)


class FlaChannel(TorchContestant):
    name = "fla_kda"
    distribution = "fla-core"
    repeats_keys = True
    per_channel = True
    notes = "flash-linear-attention, `chunk_kda` with safe_gate and its bound of -5"

    @staticmethod
    def load():
        from fla.ops.kda import chunk_kda

        return chunk_kda

    def call(self, tensors, final_state: bool):
        q, k, v, beta = tensors
        options = {"output_final_state": final_state, "cu_seqlens": self.cu_seqlens}
        return self.rule(q, k, v, self.g, beta, safe_gate=True, lower_bound=-5.0, **options)[0]


class Cudnn(TorchContestant):
    name = "cudnn"
    distribution = "nvidia-cudnn-frontend"
    repeats_keys = True
    per_channel = True
    notes = "cuDNN frontend, `cudnn.linear_attention.ops.kda.kimi_delta_attention`, tokens packed"

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        ends = [0, *accumulate(self.row.lengths)]
        self.ends = self.torch.tensor(ends, dtype=self.torch.int32, device="cuda")

    @staticmethod
    def load():
        from cudnn.linear_attention.ops.kda import kimi_delta_attention

        return kimi_delta_attention

    def call(self, tensors, final_state: bool):
        q, k, v, beta = (x.reshape(self.row.tokens, *x.shape[2:]) for x in tensors)
        g = self.g.reshape(self.row.tokens, *self.g.shape[2:])
        done = self.rule(q, k, v, g, beta, self.ends, output_final_state=final_state)
        o = done[0] if isinstance(done, tuple) else done
        return o.reshape(*self.row.batch, self.row.HV, self.row.V)


CONTESTANTS = {c.name: c for c in (Ours, Fla, FlaGated, FlashQla, FlashInfer, FlaChannel, Cudnn)}


def torch_stream(stream):
    """A context that makes a CuPy stream PyTorch's current one, if there is a PyTorch."""
    try:
        import torch
    except ImportError:
        return nullcontext()

    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))
