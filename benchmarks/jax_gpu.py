"""cupy_delta.jax on a GPU: is it right, is it captured, and what does a call cost beside CuPy's.

python benchmarks/jax_gpu.py          all of it: everything captured, nothing, and JAX's own choice
python benchmarks/jax_gpu.py --quick  without the timings

Every check prints a line; one that fails prints its traceback, the others go on, and the exit
status is 1. The options of XLA are read at its start, so each setting runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CAPTURED = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CONDITIONAL,WHILE"
    " --xla_gpu_graph_min_graph_size=1"
)
SETTINGS = {"captured": CAPTURED, "launched": "--xla_gpu_enable_command_buffer=", "default": ""}
CALLS = 20
IN_FLIGHT = 5  # programs begun before the last of them is waited for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no timings")
    parser.add_argument("--setting", choices=SETTINGS, help="one of the settings, in this process")
    parser.add_argument("--only", nargs="+", default=[], help="names of checks and timings")
    args = parser.parse_args()
    if args.setting:
        return Session(args.setting).run(args.quick, tuple(args.only))
    failed = 0
    for setting, flags in SETTINGS.items():
        print(f"\n== {setting}: XLA_FLAGS={flags}", flush=True)
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4",
            "TF_CPP_MIN_LOG_LEVEL": "1",
        }
        command = [sys.executable, __file__, "--setting", setting]
        command += ["--quick"] if args.quick else []
        command += ["--only", *args.only] if args.only else []
        status = subprocess.run(command, env=environment, timeout=280, check=False).returncode
        print(f"== {setting}: exit status {status}", flush=True)
        failed |= status != 0
    return int(failed)


class Session:
    """The checks and timings of one setting."""

    def __init__(self, setting: str):
        import cupy
        import jax

        import cupy_delta
        from cupy_delta.jax import cuda, ffi

        self.setting, self.cupy, self.jax, self.cd = setting, cupy, jax, cupy_delta
        self.calls = self.captured = self.failed = 0
        self.inside: list[float] = []  # microseconds in the handler, of each call
        print(
            f"jax {jax.__version__}, interface {ffi.header_version()}, cupy {cupy.__version__},"
            f" {jax.devices()}, plans for {cuda.facts()}",
            flush=True,
        )
        self.count_calls(cuda)

    def count_calls(self, cuda) -> None:
        """Count how often XLA calls the handler, and how often while it captures."""
        run = cuda.run

        def counted(work, sources, targets, context):
            self.calls += 1
            index = context.device()
            device = cuda.devices()[cuda.holder(targets[0]) if index is None else index]
            with device, device.stream(context.stream()):
                self.captured += self.cupy.cuda.get_current_stream().is_capturing()
            start = time.perf_counter()
            run(work, sources, targets, context)
            self.inside.append((time.perf_counter() - start) * 1e6)

        cuda.run = counted

    def run(self, quick: bool, only: tuple[str, ...] = ()) -> int:
        for name in vars(Session):  # in the order that they have here
            wanted = name.startswith("check_") or (name.startswith("time_") and not quick)
            if wanted and (not only or name in only):
                self.attempt(name)
        return int(self.failed > 0)

    def attempt(self, name: str) -> None:
        self.calls = self.captured = 0
        self.inside.clear()
        start = time.perf_counter()
        try:
            said = getattr(self, name)()
        except Exception:
            self.failed += 1
            said = "FAILED\n" + traceback.format_exc()
        spent = time.perf_counter() - start
        calls = f"{self.calls} calls, {self.captured} of them captured"
        print(f"{name}: {said} ({calls}, {spent:.1f} s)", flush=True)

    # ---- inputs ----------------------------------------------------------------------------------

    def arrays(self, B, T, H, HV, K, V, dtype, gate=False, initial=False, seed=0):
        import numpy as np

        rng = np.random.default_rng(seed)
        jnp = self.jax.numpy

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

        found = dict(
            q=normal(B, T, H, K),
            k=normal(B, T, H, K),
            v=normal(B, T, HV, V),
            beta=jnp.asarray(rng.random((B, T, HV), np.float32)),
        )
        if gate:
            found["g"] = jnp.asarray(-0.1 * rng.random((B, T, HV), np.float32))
        if initial:
            found["initial_state"] = jnp.asarray(rng.standard_normal((B, HV, K, V), np.float32))
        return found

    def definition(self, arrays):
        """The token loop in float64, in jax.lax.scan; call it where JAX has float64."""
        jax, jnp = self.jax, self.jax.numpy
        q, k, v, beta = (arrays[name] for name in ("q", "k", "v", "beta"))
        q, k = (x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        q, k = (jnp.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
        g = arrays.get("g", jnp.zeros_like(beta))
        S = arrays.get("initial_state")
        S = jnp.zeros((*v.shape[::2], k.shape[3], v.shape[3]), v.dtype) if S is None else S

        def token(S, x):
            q, k, v, beta, g = x
            S = jnp.exp(g)[..., None, None] * S
            r = v - (S * k[..., None]).sum(-2)
            S = S + k[..., None] * (beta[..., None] * r)[..., None, :]
            return S, (S * q[..., None]).sum(-2) * q.shape[-1] ** -0.5

        S, o = jax.lax.scan(token, S, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, g)))
        return jnp.moveaxis(o, 0, 1), S

    def rule(self, arrays, **options):
        from cupy_delta.jax import chunk_delta_rule

        return chunk_delta_rule(**arrays, qk_l2norm=True, **options)

    def doubles(self):
        jax = self.jax
        return (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True)

    # ---- checks ----------------------------------------------------------------------------------

    def compare(self, wanted: float, backward: bool = True, **sizes) -> str:
        """Outputs and gradients in one program, three times, beside the float64 scan."""
        import numpy as np

        jax, jnp = self.jax, self.jax.numpy
        arrays = self.arrays(**sizes)

        def value(call):
            def loss(arrays):
                results = tuple(call(arrays))
                total = 0.0
                for x in results:
                    weights = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).astype(jnp.bfloat16)
                    total += (x.ravel() * weights.astype(x.dtype)).sum().astype(jnp.float32)
                return total, results

            if not backward:
                return lambda arrays: (loss(arrays)[1], {})
            return lambda arrays: jax.grad(loss, has_aux=True)(arrays)[::-1]

        program = jax.jit(value(self.rule))
        for _ in range(3):
            outputs, gradients = jax.block_until_ready(program(arrays))
        with self.doubles():
            exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
            outputs_, gradients_ = jax.jit(value(self.definition))(exact)
        found = {"o": outputs[0], "final_state": outputs[1]} | gradients
        exact = {"o": outputs_[0], "final_state": outputs_[1]} | gradients_
        errors = {}
        for name, x in found.items():
            x, y = np.asarray(x, np.float64), np.asarray(exact[name], np.float64)
            errors[name] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
        text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        assert max(errors.values()) < wanted, f"errors above {wanted}: {text}"
        return text

    def check_float32(self):
        return self.compare(2e-5, B=2, T=200, H=2, HV=4, K=64, V=64, dtype="float32", initial=True)

    def check_bfloat16_kernels_of_9_0(self):
        return self.compare(2e-2, B=1, T=300, H=2, HV=4, K=128, V=128, dtype="bfloat16")

    def check_long_sequence_in_segments(self):
        return self.compare(2e-2, B=1, T=4096, H=2, HV=4, K=128, V=128, dtype="bfloat16")

    def check_gate(self):
        sizes = dict(B=1, T=300, H=2, HV=4, K=128, V=128, dtype="bfloat16", gate=True)
        try:
            return self.compare(3e-2, **sizes)
        except NotImplementedError as error:
            return f"{self.compare(2e-2, backward=False, **sizes)}; gradients refused: {error}"

    def check_bits_are_those_of_cupy(self):
        cupy, jax = self.cupy, self.jax
        for T in (300, 8192):
            arrays = self.arrays(1, T, 4, 8, 128, 128, "bfloat16")
            found = jax.jit(self.rule)(arrays)
            given = {name: cupy.from_dlpack(x) for name, x in arrays.items()}
            expected = self.cd.chunk_delta_rule(**given, qk_l2norm=True)
            for x, y in zip(found, expected, strict=True):
                x = cupy.from_dlpack(x)
                assert bool((x.view(cupy.uint8) == y.view(cupy.uint8)).all()), f"T = {T}"
        return "equal"

    def check_ragged(self):
        import numpy as np

        cupy, jax = self.cupy, self.jax
        arrays = self.arrays(1, 500, 2, 4, 64, 64, "bfloat16")
        ends = np.array([0, 0, 7, 260, 500])
        found = jax.jit(lambda a, ends: self.rule(a, cu_seqlens=ends))(arrays, ends)
        given = {name: cupy.from_dlpack(x) for name, x in arrays.items()}
        expected = self.cd.chunk_delta_rule(**given, cu_seqlens=ends, qk_l2norm=True)
        for x, y in zip(found, expected, strict=True):
            assert bool((cupy.from_dlpack(x).view(cupy.uint8) == y.view(cupy.uint8)).all())
        return "equal to CuPy's"

    def check_steps_in_place(self):
        from cupy_delta.jax import delta_rule_step

        jax, jnp = self.jax, self.jax.numpy
        arrays = self.arrays(8, 1, 4, 8, 128, 128, "bfloat16")
        state = jnp.zeros((16, 8, 128, 128))
        before = state.unsafe_buffer_pointer()
        step = jax.jit(delta_rule_step, donate_argnames="state")
        indices = jnp.arange(16)[::2].at[3].set(-1)
        for _ in range(4):
            o, state = jax.block_until_ready(step(**arrays, state=state, state_indices=indices))
            assert state.unsafe_buffer_pointer() == before, "the pool was copied"
        used = jnp.abs(state).sum((1, 2, 3)) > 0
        wanted = jnp.zeros(16, bool).at[jnp.array([0, 2, 4, 8, 10, 12, 14])].set(True)
        assert bool((used == wanted).all()), used
        assert not bool(jnp.abs(o[3]).any())
        return "the same address four times"

    def check_vmap_scan_and_errors(self):
        jax = self.jax
        arrays = self.arrays(4, 128, 2, 4, 64, 64, "bfloat16")
        rows = {name: x[:, None] for name, x in arrays.items()}
        mapped = jax.jit(jax.vmap(self.rule))(rows)
        assert bool((mapped.o[:, 0] == jax.jit(self.rule)(arrays).o).all())

        def layer(v, _):
            return self.rule(arrays | {"v": v}).o, None

        o, _ = jax.jit(lambda v: jax.lax.scan(layer, v, None, length=3))(arrays["v"])
        expected = arrays["v"]
        for _ in range(3):
            expected = self.rule(arrays | {"v": expected}).o
        assert bool((o == expected).all())
        try:
            jax.jit(self.rule)(arrays | {"k": arrays["k"][..., :32]})
        except ValueError as error:
            return str(error)
        raise AssertionError("no error")

    def check_two_devices(self):
        jax, jnp = self.jax, self.jax.numpy
        if len(jax.local_devices()) < 2:
            return "one device"
        arrays = self.arrays(2, 500, 4, 8, 128, 128, "bfloat16")
        expected = jax.jit(self.rule)(arrays).o
        there = {name: jax.device_put(x, jax.devices()[1]) for name, x in arrays.items()}
        o = jax.jit(self.rule)(there).o
        assert o.devices() == {jax.devices()[1]}
        assert bool((jax.device_put(o, jax.devices()[0]) == expected).all())
        mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
        along = jax.sharding.PartitionSpec(None, None, "x")
        split = jax.shard_map(
            lambda a: self.rule(a).o, mesh=mesh, in_specs=(along,), out_specs=along
        )
        off = jnp.abs(jax.jit(split)(arrays).astype(float) - expected.astype(float)).max()
        return f"shard_map over heads: {float(off):.1e} off"

    # ---- timings ---------------------------------------------------------------------------------

    def median(self, function, repeats: int = 30) -> float:
        """Milliseconds of a call that ends when its work has."""
        for _ in range(min(5, repeats)):
            function()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def replays(self, arrays, backward: bool = False):
        """Replays of CUDA graphs of CuPy's: of one call as often as asked, or of CALLS in a row."""
        cupy, cd = self.cupy, self.cd
        given = {name: cupy.from_dlpack(x).copy() for name, x in arrays.items()}
        out = cupy.empty_like(given["v"])
        stream, workspace = cupy.cuda.Stream(non_blocking=True), cd.Workspace()

        def call():
            if not backward:
                cd.chunk_delta_rule(**given, qk_l2norm=True, out=out)
                return
            forward = cd.chunk_delta_rule_fwd(**given, qk_l2norm=True, out=out)
            cd.chunk_delta_rule_bwd(forward.residuals, given["v"])

        def graph(count):
            stream.begin_capture()
            for _ in range(count):
                call()
            return stream.end_capture()

        with stream, workspace:
            call()
            stream.synchronize()
            one, many = graph(1), graph(CALLS)

        # A graph holds none of the memory that it reads and writes.
        kept = (given, out, workspace)

        def replay(graph, count, kept=kept):
            for _ in range(count):
                graph.launch(stream)
            stream.synchronize()

        return lambda count: replay(one, count), lambda: replay(many, 1)

    def programs(self, arrays, backward: bool = False):
        """The same calls one after the other in one program, each on the outputs of the last."""
        jax = self.jax

        def one(v):
            if not backward:
                return self.rule(arrays | {"v": v}).o
            _, pull = jax.vjp(lambda a: self.rule(a).o, arrays | {"v": v})
            return pull(v)[0]["v"]

        def unrolled(count):
            return jax.jit(lambda v: [v := one(v) for _ in range(count)][-1])

        loop = jax.jit(lambda v: jax.lax.fori_loop(0, CALLS, lambda _, v: one(v), v))
        return {"1": unrolled(1), f"{CALLS}": unrolled(CALLS), f"{CALLS} in a loop": loop}

    def twenty(self, backward: bool = False, **sizes) -> str:
        arrays = self.arrays(dtype="bfloat16", **sizes)
        replay, in_one_graph = self.replays(arrays, backward)
        parts = [
            f"CuPy's graphs: 1 replay {self.median(lambda: replay(1)):.3f} ms, {CALLS} calls in one"
            f" graph {self.median(in_one_graph):.3f} ms"
        ]
        for name, program in self.programs(arrays, backward).items():
            program = program.lower(arrays["v"]).compile()
            text = program.as_text()
            counts = [f"{text.count(f' {op}(')} {op}" for op in ("custom-call", "fusion", "copy")]

            def run(times=1, program=program):
                for _ in range(times):
                    o = program(arrays["v"])
                o.block_until_ready()

            for _ in range(5):
                run()
            calls = self.calls
            count = 1 if name == "1" else CALLS
            beside = []
            for times in (1, IN_FLIGHT):
                turns = [
                    (
                        self.median(lambda n=times, run=run: run(n)),
                        self.median(lambda n=count * times: replay(n)),
                    )
                    for _ in range(3)
                ]
                ours, graph = (statistics.median(x) for x in zip(*turns, strict=True))
                beside.append(f"{ours:.3f} ms, replays {graph:.3f} ms, ratio {ours / graph:.3f}")
            parts.append(
                f"{name} in a program {beside[0]}; {IN_FLIGHT} such programs {beside[1]};"
                f" the handler was called {self.calls - calls} times in"
                f" {105 * (1 + IN_FLIGHT)} runs; {', '.join(counts)}"
            )
        return "\n    ".join(["", *parts])

    def time_twenty_of_8192_tokens(self):
        return self.twenty(B=1, T=8192, H=16, HV=64, K=128, V=128)

    def time_twenty_of_2048_tokens(self):
        return self.twenty(B=1, T=2048, H=8, HV=8, K=128, V=128)

    def time_twenty_with_gradients(self):
        return self.twenty(backward=True, B=1, T=4096, H=16, HV=16, K=128, V=128)

    # ---- beside others ---------------------------------------------------------------------------

    def others(self, gate: bool) -> tuple[dict, list[str]]:
        """Return forms of the rule by name, with a gate or without, and what is left out."""
        from comparison import plain_jax

        forms, left_out = {"cupy_delta.jax": lambda x: self.rule(x)}, []
        try:
            wanted = metadata.requires("jax-linear-attention") or []
        except metadata.PackageNotFoundError:
            wanted = []
        pinned = [x for x in wanted if x.startswith("jax==") and ";" not in x]
        if pinned == [f"jax=={self.jax.__version__}"]:
            from jla.ops import linear_attention

            kind = "gated_deltanet" if gate else "deltanet"
            forms["jax-linear-attention"] = lambda x: linear_attention(
                kind, **x, use_qk_l2norm=True, output_final_state=True
            )
        else:
            here = self.jax.__version__
            left_out.append(f"jax-linear-attention left out: it wants {pinned}, here is jax {here}")
        if not gate:
            operands = self.jax.numpy.bfloat16
            forms |= {
                "plain, chunked, bfloat16": lambda x: plain_jax.chunked(**x, operands=operands),
                "plain, chunked, float32": lambda x: plain_jax.chunked(**x),
                "plain, tokens in lax.scan": lambda x: plain_jax.token_scan(**x),
            }
        return forms, left_out

    def time_beside_others(self):
        """Milliseconds until all has ended, and the error of o against float64."""
        if self.setting != "captured":
            return "in one setting alone"
        rows = (1, 2048), (1, 8192), (4, 8192), (1, 32768)
        # Plain forms come last and take short rows: they compile for long, and the time of a token
        # is the same in long ones.
        for gate in (True, False):
            forms, left_out = self.others(gate)
            exact = self.exact_outputs(1, 512, 16, 32, gate=gate)
            for name, form in forms.items():
                most = 2048 if "scan" in name else 8192 if "plain" in name else 32768
                for B, T in rows:
                    tokens = B * T
                    if tokens > most:
                        continue
                    arrays = self.arrays(B, T, 16, 32, 128, 128, "bfloat16", gate=gate)
                    try:
                        said = self.time_form(form, arrays, exact)
                    except Exception as error:
                        said = f"{type(error).__name__}: {str(error)[:300]}"
                    gated = ", gate" if gate else ""
                    print(f"    {B}x{T} h16/32{gated}, {name}: {said}", flush=True)
        return "; ".join(left_out)

    def exact_outputs(self, *sizes, gate: bool):
        import numpy as np

        arrays = self.arrays(*sizes, 128, 128, "bfloat16", gate=gate)
        with self.doubles():
            wide = {n: self.jax.numpy.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
            return arrays, np.asarray(self.jax.jit(self.definition)(wide)[0])

    def time_form(self, form, arrays, exact) -> str:
        import numpy as np

        jax = self.jax
        short, o = exact
        found = np.asarray(jax.jit(lambda x: form(x)[0])(short), np.float64)
        parts = [f"error {np.linalg.norm(found - o) / np.linalg.norm(o):.1e}"]

        def step(x):
            o, pull = jax.vjp(lambda x: form(x)[0], x)
            return pull(o)

        for what, call in {"forward": form, "forward and backward": step}.items():
            program = jax.jit(call)
            spent = self.median(lambda p=program: jax.block_until_ready(p(arrays)), 7)
            parts.append(f"{what} {spent:.3f} ms")
        return ", ".join(parts)

    def time_host_of_one_call(self):
        """Microseconds of the host per call of a small program, without waiting for its end."""
        jax = self.jax
        arrays = self.arrays(1, 64, 2, 2, 64, 64, "bfloat16")
        program = jax.jit(self.rule)
        jax.block_until_ready(program(arrays))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                result = program(arrays)
            times.append((time.perf_counter() - start) / 50 * 1e6)
            jax.block_until_ready(result)
        whole = self.median(lambda: jax.block_until_ready(program(arrays))) * 1e3
        inside = f"{statistics.median(self.inside):.0f}" if self.inside else "no"
        return (
            f"{statistics.median(times):.0f} us to dispatch, {whole:.0f} us until it has ended,"
            f" {inside} us of them in the handler"
        )


if __name__ == "__main__":
    sys.exit(main())
