"""Compile the CUDA kernels for given shapes ahead of time, into CuPy's cache.

With --arch on a machine without a GPU, for an image that will run on one: calls there with the
same CuPy, NVRTC, folders and cache compile nothing more.
"""

from __future__ import annotations

import itertools

from ..arrays import FLOAT_DTYPES
from ..cuda import compile_variants, launches_of
from ..cuda.architectures import ARCHITECTURES
from ..cuda.spec import Launch
from ..cuda.variants import PASSES, STEPS
from .console import gpu_problem, positive, positives, progress

# Options that say nothing of calls without one of these passes.
OF_PASSES = {
    "chunk_size": ("forward", "prefill", "backward", "blocks"),
    "checkpoint_every": ("prefill",),
    "pool_dtype": ("prefill", "step"),
}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--arch",
        choices=list(ARCHITECTURES),
        help="architecture to compile for, here without a GPU (default: that of the current GPU)",
    )
    parser.add_argument(
        "--multiprocessors",
        type=positive,
        metavar="N",
        help="with --arch, of the card that will be used; how work is divided depends on it"
        " (default: those of the largest card)",
    )
    many = dict(type=positives, metavar="N[,N...]")
    parser.add_argument("-K", "--K", **many, default=[128], help="key sizes (default: 128)")
    parser.add_argument("-V", "--V", type=positive, metavar="N", help="value size (default: K)")
    parser.add_argument("-B", "--batch", **many, default=[1], help="sequences (default: 1)")
    parser.add_argument(
        "-T", "--tokens", **many, default=[1024], help="tokens T (default: 1024), of steps any"
    )
    parser.add_argument(
        "-H", "--heads", type=positive, default=16, help="key heads H (default: 16)"
    )
    parser.add_argument(
        "--value-heads", type=positive, metavar="HV", help="value heads HV (default: H)"
    )
    parser.add_argument(
        "--dtype",
        default=["bfloat16"],
        nargs="+",
        choices=list(FLOAT_DTYPES),
        help="of q, k and v (default: bfloat16)",
    )
    parser.add_argument(
        "--passes",
        default=["forward"],
        nargs="+",
        choices=PASSES,
        help="what will be called (default: forward)",
    )
    parser.add_argument(
        "--chunk-size", type=positive, metavar="N", help="where calls pass one (default: none)"
    )
    parser.add_argument(
        "--gate",
        nargs="?",
        choices=("scalar", "channel"),
        const="scalar",
        default=False,
        help="with a gate, one per head, or per key channel with --gate channel",
    )
    parser.add_argument(
        "--narrow-gate",
        action="store_true",
        help="with --gate channel, g in the dtype of q (default: in float32)",
    )
    parser.add_argument(
        "--raw",
        choices=("softplus", "sigmoid"),
        help="with a SoftplusGate or SigmoidGate and a SigmoidBeta, their logits in the dtype of q,"
        " and a dt_bias of (HV,), or (HV, K) with --gate channel",
    )
    parser.add_argument("--varlen", action="store_true", help="with cu_seqlens")
    parser.add_argument("--qk-l2norm", action="store_true", help="with qk_l2norm=True")
    parser.add_argument(
        "--state-layout", choices=("kv", "vk"), default="kv", help="of the states (default: kv)"
    )
    parser.add_argument(
        "--pool-dtype",
        choices=[name for name in FLOAT_DTYPES if name != "float64"],
        help="of pools that prefill and step work on (default: that of sums)",
    )
    parser.add_argument(
        "--checkpoint-every", type=positive, metavar="N", help="where prefill passes one"
    )


def run_command(args) -> int:
    from .main import CommandError

    if (args.value_heads or args.heads) % args.heads:
        raise CommandError(
            f"--value-heads: expected a multiple of --heads = {args.heads}, got {args.value_heads}"
        )
    for option, some in OF_PASSES.items():
        if getattr(args, option) is not None and not set(some) & set(args.passes):
            raise CommandError(
                f"--{option.replace('_', '-')}: expected with --passes {' or '.join(some)},"
                f" got {' '.join(args.passes)}"
            )
    if args.narrow_gate and (args.gate != "channel" or args.raw):
        raise CommandError("--narrow-gate: expected with --gate channel and without --raw")
    device = device_for(args)
    distinct: dict[tuple, Launch] = {}
    passes = [(name, T, False) for name in args.passes if name != "step" for T in args.tokens]
    if "step" in args.passes:  # whose tokens may be drafts, of which some are accepted
        passes += [("step", T, some) for T in STEPS for some in (False, True)]
    for dtype, K, B, (name, T, accepting) in itertools.product(
        args.dtype, args.K, args.batch, passes
    ):
        launches = launches_of(
            device.facts,
            (name,),
            dtype=dtype,
            K=K,
            V=args.V or K,
            B=B,
            T=T,
            H=args.heads,
            HV=args.value_heads,
            chunk_size=args.chunk_size,
            gate=args.gate,
            narrow_gate=args.narrow_gate,
            raw=args.raw,
            varlen=args.varlen,
            qk_l2norm=args.qk_l2norm,
            state_layout=args.state_layout,
            checkpoint_every=args.checkpoint_every,
            pool_dtype=args.pool_dtype,
            accepting=accepting,
        )
        for launch in launches:
            distinct.setdefault((launch.file, launch.defines), launch)
    launches = list(distinct.values())
    ready = compile_variants(device, launches)
    for _ in progress(launches, "compiling"):
        next(ready)
    where = f" for {args.arch}" if args.arch else ""
    count = f"{len(launches)} kernel{'' if len(launches) == 1 else 's'}"
    print(f"{count} ready{where}: {', '.join(sorted({x.entry for x in launches}))}")
    return 0


def device_for(args):
    """The current CUDA device or what stands for one, or an error that says why there is none."""
    from .main import CommandError

    if args.arch is None:
        if args.multiprocessors:
            raise CommandError("--multiprocessors: expected with --arch alone, a GPU has its own")
        return current_device()
    from ..cuda import environment

    problem = environment()["cannot_compile"]
    if problem:
        raise CommandError(f"kernels cannot be compiled: {problem}")
    from ..cuda.runtime.ahead import Architecture

    facts = ARCHITECTURES[args.arch]
    return Architecture(facts._replace(sm_count=args.multiprocessors or facts.sm_count))


def current_device():
    """The current CUDA device, or an error that says why there is none."""
    from .main import CommandError

    problem = gpu_problem()
    if problem:
        raise CommandError(f"no GPU can be used: {problem}; to compile without one, pass --arch")
    import cupy

    from ..cuda.runtime.device import CupyDevice

    return CupyDevice(cupy.cuda.Device().id)
