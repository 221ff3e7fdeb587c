"""What BPF programs cost by the kernel's own count (``kernel.bpf_stats_enabled``), read by bpf()."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SYSCALL = {"x86_64": 321, "aarch64": 280}
_PROG_GET_NEXT_ID, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 11, 13, 15
_INFO_SIZE, _NAME, _RUN_TIME, _RUN_COUNT = 224, 64, 192, 200
_SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")


@dataclass(frozen=True, slots=True)
class ProgramCost:
    """One loaded BPF program: ``run_ns`` in ``runs`` executions since it was loaded."""

    number: int
    name: str
    run_ns: int
    runs: int


def _bpf(command: int, attributes: bytearray) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result: int = libc.syscall(_SYSCALL[platform.machine()], command, ctypes.byref(buffer), len(attributes))
    return result


def programs() -> dict[int, ProgramCost]:
    """Every BPF program of the machine, by id."""
    found: dict[int, ProgramCost] = {}
    number = 0
    while True:
        attributes = bytearray(struct.pack("=III", number, 0, 0).ljust(64, b"\0"))
        if _bpf(_PROG_GET_NEXT_ID, attributes) < 0:
            return found
        number = struct.unpack_from("=I", attributes, 4)[0]
        cost = _program(number)
        if cost is not None:
            found[number] = cost


def _program(number: int) -> ProgramCost | None:
    fd = _bpf(_PROG_GET_FD_BY_ID, bytearray(struct.pack("=III", number, 0, 0).ljust(64, b"\0")))
    if fd < 0:
        return None
    try:
        info = ctypes.create_string_buffer(_INFO_SIZE)
        address = ctypes.addressof(info)
        attributes = bytearray(struct.pack("=IIQ", fd, _INFO_SIZE, address).ljust(64, b"\0"))
        if _bpf(_OBJ_GET_INFO_BY_FD, attributes) < 0:
            return None
        name = info.raw[_NAME : _NAME + 16].split(b"\0")[0].decode(errors="replace")
        run_ns, runs = struct.unpack_from("=QQ", info.raw, _RUN_TIME)
        return ProgramCost(number, name, run_ns, runs)
    finally:
        os.close(fd)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Counting on for the time of a block; it costs a little itself, so never during timed rounds."""
    before = _SWITCH.read_text()
    _SWITCH.write_text("1")
    try:
        yield
    finally:
        _SWITCH.write_text(before)
