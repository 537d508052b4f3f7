"""Compile the CUDA kernels for given shapes ahead of time, into CuPy's cache."""

from __future__ import annotations

from ..arrays import FLOAT_DTYPES
from ..cuda import compile_variants, launches_of
from ..cuda.variants import PASSES
from .console import gpu_problem, positive, positives, progress


def add_arguments(parser) -> None:
    parser.add_argument("-K", "--key-size", type=positives, default=[128], metavar="N[,N...]")
    parser.add_argument("-V", "--value-size", type=positive, metavar="N", help="default: V = K")
    parser.add_argument("-B", "--batch", type=positive, default=1, help="sequences")
    parser.add_argument("-T", "--tokens", type=positive, default=1024, help="tokens T")
    parser.add_argument("-H", "--heads", type=positive, default=16, help="key heads H")
    parser.add_argument("--value-heads", type=positive, metavar="HV", help="default: HV = H")
    parser.add_argument("--dtype", default="bfloat16", choices=list(FLOAT_DTYPES))
    parser.add_argument(
        "--passes",
        default=["forward"],
        nargs="+",
        choices=PASSES,
        help="what will be called (default: forward)",
    )
    parser.add_argument("--chunk-size", type=positive, metavar="N")
    parser.add_argument("--gate", action="store_true", help="with a scalar gate")
    parser.add_argument("--varlen", action="store_true", help="with cu_seqlens")
    parser.add_argument("--qk-l2norm", action="store_true")
    parser.add_argument("--state-layout", choices=("kv", "vk"), default="kv")


def run_command(args) -> int:
    device = current_device()
    launches = []
    for K in args.key_size:
        launches += launches_of(
            device.facts,
            tuple(args.passes),
            dtype=args.dtype,
            K=K,
            V=args.value_size or K,
            B=args.batch,
            T=args.tokens,
            H=args.heads,
            HV=args.value_heads,
            chunk_size=args.chunk_size,
            gate=args.gate,
            varlen=args.varlen,
            qk_l2norm=args.qk_l2norm,
            state_layout=args.state_layout,
        )
    ready = compile_variants(device, launches)
    for _ in progress(launches, "compiling"):
        next(ready)
    print(f"{len(launches)} kernels ready: {', '.join(sorted({x.entry for x in launches}))}")
    return 0


def current_device():
    """The current CUDA device, or an error that says why there is none."""
    from .main import CommandError

    problem = gpu_problem()
    if problem:
        raise CommandError(f"no GPU can be used: {problem}")
    import cupy

    from ..cuda.runtime.device import CupyDevice

    return CupyDevice(cupy.cuda.Device().id)
