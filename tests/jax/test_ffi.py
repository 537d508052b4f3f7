"""The mirror of XLA's foreign function interface, and programs that outlive their process."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from cupy_delta.jax import ffi

# Structures of ffi.py, and what they are in c_api.h; a field is its own name, but for those here.
MIRRORED = {
    ffi.Version: "XLA_FFI_Api_Version",
    ffi.Api: "XLA_FFI_Api",
    ffi.CallFrame: "XLA_FFI_CallFrame",
    ffi.Attributes: "XLA_FFI_Attrs",
    ffi.Buffer: "XLA_FFI_Buffer",
    ffi.ByteSpan: "XLA_FFI_ByteSpan",
    ffi.MetadataExtension: "XLA_FFI_Metadata_Extension",
    ffi.Metadata: "XLA_FFI_Metadata",
    ffi.ErrorCreate: "XLA_FFI_Error_Create_Args",
    ffi.StreamGet: "XLA_FFI_Stream_Get_Args",
    ffi.DeviceOrdinalGet: "XLA_FFI_DeviceOrdinal_Get_Args",
}
CONSTANTS = {
    "XLA_FFI_Extension_Metadata": ffi.METADATA,
    "XLA_FFI_ExecutionStage_INSTANTIATE": ffi.INSTANTIATE,
    "XLA_FFI_ExecutionStage_EXECUTE": ffi.EXECUTE,
    "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE": ffi.COMMAND_BUFFER_COMPATIBLE,
    "XLA_FFI_Error_Code_INVALID_ARGUMENT": ffi.INVALID_ARGUMENT,
    "XLA_FFI_Error_Code_UNIMPLEMENTED": ffi.UNIMPLEMENTED,
    "XLA_FFI_Error_Code_INTERNAL": ffi.INTERNAL,
    "XLA_FFI_API_MAJOR": ffi.MAJOR,
}


def header() -> Path:
    return Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")


def fields_of(structure):
    """The fields of a structure by name: offset and size. Those that are not used have no name."""
    inherited = ffi.Header._fields_ if issubclass(structure, ffi.Header) else []
    names = [name for name, *_ in (*inherited, *structure._fields_)]
    found = {name: getattr(structure, name) for name in names if not name.startswith("function")}
    return {name: (field.offset, field.size) for name, field in found.items()}


def compiled(tmp_path, lines):
    """Run a C program that knows the header, and return the integers it prints."""
    source = tmp_path / "print.c"
    prints = "".join(f'printf("%lld\\n", (long long)({x}));' for x in lines)
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{header()}"\nint main(void) {{ {prints} return 0; }}\n'
    )
    compiler = shutil.which("gcc") or shutil.which("cc")
    subprocess.run([compiler, source, "-o", tmp_path / "print"], check=True)
    output = subprocess.run([tmp_path / "print"], check=True, capture_output=True, text=True)
    return [int(x) for x in output.stdout.split()]


def test_every_field_is_where_the_header_has_it(tmp_path):
    mirrored = dict(MIRRORED)
    if "XLA_FFI_DeviceOrdinal_Get_Args" not in header().read_text():
        del mirrored[ffi.DeviceOrdinalGet]  # younger than this version of JAX
    wanted, found = [], {}
    for structure, name in mirrored.items():
        for field, place in fields_of(structure).items():
            if field == "XLA_FFI_DeviceOrdinal_Get" and ffi.DeviceOrdinalGet not in mirrored:
                continue
            wanted += [f"offsetof({name}, {field})", f"sizeof((({name}*)0)->{field})"]
            found |= dict(zip(wanted[-2:], place, strict=True))
    # The same structure twice, for arguments and for results.
    for name, last in (("XLA_FFI_Args", "args"), ("XLA_FFI_Rets", "rets")):
        for field, place in fields_of(ffi.Buffers).items():
            field = last if field == "buffers" else field
            wanted += [f"offsetof({name}, {field})", f"sizeof((({name}*)0)->{field})"]
            found |= dict(zip(wanted[-2:], place, strict=True))
    base = "XLA_FFI_Metadata_Extension, extension_base"
    for field, (offset, _) in fields_of(ffi.Extension).items():
        wanted.append(f"offsetof({base}.{field})")
        found[wanted[-1]] = offset
    assert found == dict(zip(wanted, compiled(tmp_path, wanted), strict=True))
    assert len(found) > 70


def test_constants_are_those_of_the_header(tmp_path):
    values = compiled(tmp_path, CONSTANTS)
    assert dict(zip(CONSTANTS, values, strict=True)) == CONSTANTS


def test_the_version_in_the_header(tmp_path):
    expected = compiled(tmp_path, ["XLA_FFI_API_MAJOR", "XLA_FFI_API_MINOR"])
    assert list(ffi.header_version()) == expected


def test_what_an_old_runtime_lacks_is_not_asked_for():
    api = ffi.Api(struct_size=ffi.Api.XLA_FFI_Stream_Get.offset + 8)
    assert api.has("XLA_FFI_Stream_Get") and not api.has("XLA_FFI_DeviceOrdinal_Get")
    frame = ffi.CallFrame(api=ctypes.pointer(api))
    assert ffi.Context(frame).device() is None


# ---- other processes -----------------------------------------------------------------------------


def python(program, **environment):
    """Run a program in another process, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_what_a_thread_of_xla_keeps_is_there_in_its_next_call():
    """CuPy keeps current streams so; Python by itself forgets the thread after every call."""
    program = """
        import collections, threading
        import jax, jax.numpy as jnp
        from cupy_delta.jax import chunk_delta_rule, host

        kept, calls, run = threading.local(), collections.Counter(), host.run

        def counted(*args):
            kept.calls = getattr(kept, "calls", 0) + 1
            calls[threading.get_ident()] += 1
            assert kept.calls == calls[threading.get_ident()], "forgotten"
            run(*args)

        host.run = counted
        k = jnp.ones((1, 64, 2, 8))
        rule = lambda _, v: chunk_delta_rule(k, k, v, k[..., 0]).o
        many = jax.jit(lambda k: jax.lax.fori_loop(0, 4, rule, k) @ jnp.ones((8, 8)))
        for _ in range(3):
            jax.block_until_ready(many(k))
        print(sum(calls.values()), threading.get_ident() in calls)
    """
    assert python(program, XLA_FLAGS="") == ["12", "False"]


COMPILED = """
    import jax, jax.numpy as jnp
    from cupy_delta.jax import chunk_delta_rule
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    k = jnp.linspace(0, 1, 60).reshape(1, 20, 1, 3)
    o = jax.jit(lambda k: chunk_delta_rule(k, k, k, k[..., 0]).o)(k)
    print(float(o.sum()), sum("cache_hits" in name for name in hits))
"""


def test_a_program_that_jax_has_kept_runs_in_another_process(tmp_path):
    kept = dict(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    first, hits = python(COMPILED, **kept)
    assert hits == "0"
    again, hits = python(COMPILED, **kept)
    assert again == first and int(hits) > 0


def test_an_exported_program_needs_no_more_than_the_import(tmp_path):
    import jax.export
    import jax.numpy as jnp

    from cupy_delta.jax import chunk_delta_rule, host

    k = jnp.linspace(0, 1, 60).reshape(1, 20, 1, 3)
    value = jax.jit(jax.grad(lambda k: chunk_delta_rule(k, k, k, k[..., 0]).o.sum()))
    unchecked = jax.export.DisabledSafetyCheck.custom_call(ffi.name_of(host))
    exported = jax.export.export(value, disabled_checks=[unchecked])(k)
    (tmp_path / "program").write_bytes(exported.serialize())
    program = f"""
        import jax, jax.export, jax.numpy as jnp, pathlib
        import cupy_delta.jax
        program = jax.export.deserialize(pathlib.Path({str(tmp_path / "program")!r}).read_bytes())
        print(float(program.call(jnp.linspace(0, 1, 60).reshape(1, 20, 1, 3)).sum()))
    """
    assert python(program) == [str(float(value(k).sum()))]


def test_names_change_with_the_version_and_the_kernels(monkeypatch):
    from cupy_delta.jax import cuda, host

    names = [ffi.name_of(host), ffi.name_of(cuda)]
    assert [ffi.name_of(host), ffi.name_of(cuda)] == names
    monkeypatch.setattr(cuda, "contract", lambda: ("other kernels",))
    names.append(ffi.name_of(cuda))
    monkeypatch.setattr(ffi, "__version__", "another")
    names += [ffi.name_of(host), ffi.name_of(cuda)]
    assert len(set(names)) == 5


@pytest.mark.parametrize(
    ("imported", "error"),
    [("cupy_delta", ""), ("cupy_delta.jax", "cupy_delta.jax needs JAX 0.5 or newer")],
)
def test_jax_is_imported_on_demand_alone(imported, error):
    program = f"""
        import sys
        sys.modules["jax"] = None  # importing it fails
        try:
            import {imported}
        except ImportError as error:
            print(error)
    """
    assert " ".join(python(program)).startswith(error)
