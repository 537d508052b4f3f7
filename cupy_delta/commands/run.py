"""Apply the operator to your own arrays: IN.npz to OUT.npz.

IN holds q, k, v, beta and, if wanted, g, initial_state and cu_seqlens; OUT gets o and final_state.
NumPy cannot store bfloat16: it saves such arrays as raw 2-byte items, and --bfloat16 reads raw
2-byte items as bfloat16. Outputs in bfloat16 are stored the same way, and read by
np.load("OUT.npz")["o"].view(ml_dtypes.bfloat16).
"""

from __future__ import annotations

import os
import zipfile
from typing import Any

import numpy as np

from ..arrays import FLOAT_DTYPES
from ..operators import chunk_delta_rule, recurrent_delta_rule
from .console import NOT_FINITE, Device, add_device, not_finite, positive
from .output import check_output, tell, whole_file

REQUIRED = ("q", "k", "v", "beta")
OPTIONAL = ("g", "initial_state", "cu_seqlens")


def add_arguments(parser) -> None:
    parser.add_argument("input", metavar="IN.npz", help="the arrays")
    parser.add_argument(
        "-o", "--output", metavar="OUT.npz", required=True, help="where the results go"
    )
    parser.add_argument(
        "--operator",
        choices=("chunk", "recurrent"),
        default="chunk",
        help="in chunks or token by token (default: chunk)",
    )
    parser.add_argument("--scale", type=float, help="factor on the outputs (default: K ** -0.5)")
    parser.add_argument("--qk-l2norm", action="store_true", help="normalise q and k first")
    parser.add_argument(
        "--chunk-size", type=positive, metavar="N", help="tokens per chunk (default: chosen)"
    )
    parser.add_argument(
        "--state-layout", choices=("kv", "vk"), default="kv", help="of the states (default: kv)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="raw 2-byte items are bfloat16")
    add_device(parser, default="cpu")


def run_command(args) -> int:
    from .main import CommandError

    if args.operator == "recurrent" and args.chunk_size:
        raise CommandError("--chunk-size: the recurrent operator has no chunks")
    check_output(args.output, (".npz",))
    arrays = _load(args.input, args.bfloat16)
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        raise CommandError(f"{args.output}: expected another file than the input")
    device = Device(args.device)
    moved = {name: device.to(x) for name, x in arrays.items()}
    options = dict(
        scale=args.scale,
        qk_l2norm=args.qk_l2norm,
        state_layout=args.state_layout,
        initial_state=moved.get("initial_state"),
        cu_seqlens=moved.get("cu_seqlens"),
    )
    inputs: list[Any] = [moved.get(name) for name in (*REQUIRED, "g")]
    if args.operator == "chunk":
        result = chunk_delta_rule(*inputs, chunk_size=args.chunk_size, **options)
    else:
        result = recurrent_delta_rule(*inputs, **options)
    o, final_state = (device.back(x) for x in result)
    with whole_file(args.output) as file:
        np.savez(file, o=o, final_state=final_state)
    print(f"{args.output}: o {o.shape} {o.dtype}, final_state {final_state.shape}")
    if o.dtype == FLOAT_DTYPES["bfloat16"]:
        print(f'read o with np.load("{args.output}")["o"].view(ml_dtypes.bfloat16)')
    diverged = not_finite(dict(o=o, final_state=final_state))
    if not diverged:
        return 0
    if "g" in arrays:
        arrays["g"] = np.maximum(arrays["g"], 0)  # -inf forgets all, which is no reason
    given = not_finite({name: x for name, x in arrays.items() if name != "cu_seqlens"})
    reason = f"in {args.input} there are {given}" if given else WHY
    tell(f"cupy_delta run: not finite: {diverged}; {reason}")
    return NOT_FINITE


WHY = (
    "keys that are not of unit length, or a beta beyond 2, make states grow: --qk-l2norm, and"
    ' "When it diverges" in docs/conventions.md'
)


def _load(path: str, bfloat16: bool) -> dict:
    from .main import CommandError

    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise CommandError(f"{path}: expected an .npz file with q, k, v and beta by name")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise CommandError(f"{path}: not a readable .npz file ({error})") from error
    except OSError as error:
        raise CommandError(f"{path}: cannot be read ({error.strerror or error})") from error
    unknown = set(arrays) - {*REQUIRED, *OPTIONAL}
    if unknown or not set(REQUIRED) <= set(arrays):
        raise CommandError(
            f"{path}: expected arrays {', '.join(REQUIRED)} and optionally"
            f" {', '.join(OPTIONAL)}, found {', '.join(arrays) or 'nothing'}"
        )
    for name, x in arrays.items():
        if x.dtype.str == "|V2":
            if not bfloat16:
                raise CommandError(f"{path}: {name} is raw 2-byte items; is it --bfloat16?")
            arrays[name] = x.view(FLOAT_DTYPES["bfloat16"])
    return arrays
