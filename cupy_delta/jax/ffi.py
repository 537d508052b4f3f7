"""XLA's foreign function interface, as far as a handler needs it, mirrored in ctypes.

The structures are those of ``xla/ffi/api/c_api.h``, in the order of its fields; a test compares
every one of them with the header that jaxlib ships. Only fields are mirrored that all versions of
the interface have, but for the last functions of `Api`, which `Api.has` tells.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import threading
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import jax

from ..version import __version__
from .ending import end_well
from .work import Work, work_of

METADATA = 1
INSTANTIATE, EXECUTE = 0, 3
COMMAND_BUFFER_COMPATIBLE = 1
MAJOR = 0  # of the interface that is mirrored here
INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 3, 12, 13
PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}  # as JAX and as XLA calls them


class Header(ctypes.Structure):
    """What every structure begins with: how much of it the other side knows, and extensions."""

    _fields_ = [("struct_size", c_size_t), ("extension_start", c_void_p)]


class Version(Header):
    _fields_ = [("major_version", c_int), ("minor_version", c_int)]


class Api(Header):
    """The functions of the runtime."""

    _fields_ = [
        ("api_version", Version),
        ("internal_api", c_void_p),
        ("XLA_FFI_Error_Create", c_void_p),
        *((f"function {i}", c_void_p) for i in range(1, 4)),
        ("XLA_FFI_Stream_Get", c_void_p),
        *((f"function {i}", c_void_p) for i in range(5, 17)),
        ("XLA_FFI_DeviceOrdinal_Get", c_void_p),
    ]

    def has(self, function: str) -> bool:
        """Whether this runtime is new enough to have a function."""
        field = getattr(Api, function)
        return field.offset + field.size <= self.struct_size


class Buffers(Header):
    """The arguments of a call, or its results."""

    _fields_ = [("size", c_int64), ("types", c_void_p), ("buffers", POINTER(c_void_p))]


class Attributes(Header):
    _fields_ = [
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(c_void_p)),
        ("attrs", POINTER(c_void_p)),
    ]


class CallFrame(Header):
    _fields_ = [
        ("api", POINTER(Api)),
        ("ctx", c_void_p),
        ("stage", c_int),
        ("args", Buffers),
        ("rets", Buffers),
        ("attrs", Attributes),
    ]


class Buffer(Header):
    _fields_ = [
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    ]


class ByteSpan(ctypes.Structure):
    _fields_ = [("ptr", c_void_p), ("len", c_size_t)]


class Extension(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p)]


class MetadataExtension(ctypes.Structure):
    _fields_ = [("extension_base", Extension), ("metadata", c_void_p)]


class Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("api_version", Version), ("traits", c_uint32)]


class ErrorCreate(Header):
    _fields_ = [("message", c_char_p), ("errc", c_int)]


class StreamGet(Header):
    _fields_ = [("ctx", c_void_p), ("stream", c_void_p)]


class DeviceOrdinalGet(Header):
    _fields_ = [("ctx", c_void_p), ("device_ordinal", c_int32)]


class Context:
    """What a handler may ask the runtime about the call that it is in."""

    def __init__(self, frame: CallFrame):
        self._api, self._ctx = frame.api.contents, frame.ctx

    def stream(self) -> int:
        """Return the address of the stream that the call belongs to."""
        return self._ask("XLA_FFI_Stream_Get", StreamGet).stream or 0

    def device(self) -> int | None:
        """Return the number of the device, or None if the runtime is too old to tell."""
        if not self._api.has("XLA_FFI_DeviceOrdinal_Get"):
            return None
        return self._ask("XLA_FFI_DeviceOrdinal_Get", DeviceOrdinalGet).device_ordinal

    def _ask(self, name: str, structure):
        question = structure(ctypes.sizeof(structure), None, self._ctx)
        if _function(getattr(self._api, name))(ctypes.byref(question)):
            raise RuntimeError(f"XLA refuses {name}")
        return question


@cache
def _function(address: int):
    return ctypes.CFUNCTYPE(c_void_p, c_void_p)(address)


def handler(platform: str, backend):
    """Return a C function for XLA that prepares a work, and later does it, by a backend.

    An exception becomes the call's error, with its text.
    """

    @ctypes.CFUNCTYPE(c_void_p, c_void_p)
    def call(address):
        frame = CallFrame.from_address(address)
        try:
            _this_thread.keep()
            if frame.extension_start:
                extension = MetadataExtension.from_address(frame.extension_start)
                if extension.extension_base.type == METADATA:
                    _describe(frame, Metadata.from_address(extension.metadata))
                    return None
            if frame.stage == EXECUTE:
                work, sources, targets = (
                    _work(frame),
                    _addresses(frame.args),
                    _addresses(frame.rets),
                )
                backend.run(work, sources, targets, Context(frame))
            elif frame.stage == INSTANTIATE:
                end_well(platform)
                backend.prepare(_work(frame))
            return None
        except BaseException as error:  # nothing may pass through the C code that called
            return _error(frame.api.contents, error)

    return call


class _ThisThread(threading.local):
    """Python's state of a thread of XLA's, which Python else forgets at the end of every call.

    With it would go what is kept per thread: CuPy's current streams, and streams of ours.
    """

    def __init__(self):
        ctypes.pythonapi.PyGILState_Ensure()  # never released

    def keep(self) -> None:
        """Keep it from the first call on, which has made this object in this thread."""


_this_thread = _ThisThread()


def _describe(frame: CallFrame, metadata: Metadata) -> None:
    """Tell the runtime which interface the handler speaks, and that its work can be captured.

    Within a major version the interface only grows, so it is that of the runtime.
    """
    if frame.api:
        version = frame.api.contents.api_version
        major, minor = version.major_version, version.minor_version
    else:  # jaxlib before 0.6 asks without a word about itself
        major, minor = header_version()
    if major == MAJOR:
        metadata.api_version.major_version, metadata.api_version.minor_version = major, minor
    metadata.traits = COMMAND_BUFFER_COMPATIBLE


def header_version() -> tuple[int, int]:
    """Return the version of the interface in the header that jaxlib ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = re.findall(r"^#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header, re.MULTILINE)
    major, minor = map(int, found)
    return major, minor


def _work(frame: CallFrame) -> Work:
    """Read the only attribute, a string."""
    span = ByteSpan.from_address(frame.attrs.attrs[0])
    return work_of(ctypes.string_at(span.ptr, span.len))


def _addresses(buffers: Buffers) -> list[int]:
    return [Buffer.from_address(address).data or 0 for address in buffers.buffers[: buffers.size]]


def _error(api: Api, error: BaseException) -> int:
    code = INTERNAL
    if isinstance(error, NotImplementedError):
        code = UNIMPLEMENTED
    elif isinstance(error, TypeError | ValueError):
        code = INVALID_ARGUMENT
    text = f"{type(error).__name__}: {error}".encode()
    arguments = ErrorCreate(ctypes.sizeof(ErrorCreate), None, text, code)
    return _function(api.XLA_FFI_Error_Create)(ctypes.byref(arguments))


_registered: list = []  # handlers live as long as the process: programs hold their addresses


@cache
def target(platform: str, backend) -> str:
    """Register a backend for a platform and return the name that programs call it by."""
    call, name = handler(platform, backend), name_of(backend)
    _registered.append(call)
    capsule = jax.ffi.pycapsule(ctypes.cast(call, c_void_p).value)
    stages = {"instantiate": capsule, "execute": capsule}
    jax.ffi.register_ffi_target(name, stages, platform=PLATFORMS[platform])
    return name


def name_of(backend) -> str:
    """Name what a program may rely on.

    A program that JAX or the user has kept meets the handler that it was made for, or none.
    """
    digest = hashlib.sha256("\0".join((__version__, *backend.contract())).encode()).hexdigest()
    return f"cupy_delta_{backend.NAME}_{digest[:16]}"
