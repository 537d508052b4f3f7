"""GPUs by architecture, for plans that are made without one."""

from __future__ import annotations

from .spec import DeviceFacts

KIB = 1024
# Multiprocessors of the largest card, and the shared memory that one block may have (CUDA C++
# programming guide, technical specifications per compute capability).
ARCHITECTURES = {
    "sm_80": DeviceFacts(sm_count=108, shared_bytes=163 * KIB, capability=(8, 0)),
    "sm_86": DeviceFacts(sm_count=84, shared_bytes=99 * KIB, capability=(8, 6)),
    "sm_87": DeviceFacts(sm_count=16, shared_bytes=163 * KIB, capability=(8, 7)),
    "sm_89": DeviceFacts(sm_count=142, shared_bytes=99 * KIB, capability=(8, 9)),
    "sm_90": DeviceFacts(sm_count=132, shared_bytes=227 * KIB, capability=(9, 0)),
    "sm_100": DeviceFacts(sm_count=148, shared_bytes=227 * KIB, capability=(10, 0)),
    "sm_103": DeviceFacts(sm_count=148, shared_bytes=227 * KIB, capability=(10, 3)),
    "sm_120": DeviceFacts(sm_count=188, shared_bytes=99 * KIB, capability=(12, 0)),
    "sm_121": DeviceFacts(sm_count=48, shared_bytes=99 * KIB, capability=(12, 1)),
}
