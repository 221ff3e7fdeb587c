"""bpf(2) and perf_event_open(2) called directly, where bcc has no way: the kernel's own errno is the answer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from pathlib import Path

_SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}
_KPROBE_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")

# Commands, program types and attach types of bpf(2), by their numbers in the kernel's interface.
_PROG_LOAD, _RAW_TRACEPOINT_OPEN, _LINK_CREATE, _ITER_CREATE = 5, 17, 28, 33
TYPE_KPROBE, TYPE_RAW_TRACEPOINT, TYPE_TRACING = 2, 17, 26
FENTRY, FEXIT, ITER = 24, 25, 28
_SMALLEST_ATTR = 64
_LOG_BYTES = 1 << 20
_PERF_ATTR_SIZE, _PERF_ATTR_CONFIG1 = 112, 56
_PERF_ENABLE, _PERF_SET_BPF = 0x2400, 0x40042408


def load_program(
    kind: int, code: bytes, *, attach_type: int = 0, target: int = 0, name: str = "vmatrace"
) -> int:
    """Load a program of 8-byte instructions; its file descriptor, or `OSError` with the verifier's last words."""
    held, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attr = bytearray(120)
    struct.pack_into("<IIQQ", attr, 0, kind, len(code) // 8, ctypes.addressof(held), ctypes.addressof(licence))
    struct.pack_into("<16s", attr, 48, name.encode()[:15])
    struct.pack_into("<I", attr, 68, attach_type)
    struct.pack_into("<I", attr, 108, target)
    try:
        return _bpf(_PROG_LOAD, bytes(attr))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG):
            raise
    log = ctypes.create_string_buffer(_LOG_BYTES)
    struct.pack_into("<IIQ", attr, 24, 1, _LOG_BYTES, ctypes.addressof(log))
    try:
        return _bpf(_PROG_LOAD, bytes(attr))
    except OSError as error:
        words = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
        said = " | ".join(line for line in words[-2:] if not line.startswith("processed "))
        text = f"{error.strerror}; the verifier: {said[-200:]}" if said else error.strerror
        raise OSError(error.errno, text) from None


def attach_program(program: int, tracepoint: str = "") -> int:
    """Attach to a raw tracepoint; without a name to the function that a tracing program was loaded for."""
    text = ctypes.create_string_buffer(tracepoint.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QI", ctypes.addressof(text) if tracepoint else 0, program))


def link_iterator(program: int) -> int:
    """Link an iterator's program."""
    return _bpf(_LINK_CREATE, struct.pack("<IIIIQI", program, 0, ITER, 0, 0, 0))


def run_iterator(link: int) -> int:
    """Begin one run of a linked iterator: a file descriptor to read from."""
    return _bpf(_ITER_CREATE, struct.pack("<II", link, 0))


def open_kprobe(symbol: str, *, at_return: bool) -> int:
    """A perf event at the first instruction or the return of a function; `attach_kprobe` gives it a program."""
    try:
        kind = int(_KPROBE_TYPE.read_text())
    except (OSError, ValueError):
        raise OSError(errno.ENOENT, "not configured in this kernel") from None
    # struct perf_event_attr: type, size, config (bit 0: at return), then config1 (the name) at byte 56.
    name = ctypes.create_string_buffer(symbol.encode())
    attr = bytearray(_PERF_ATTR_SIZE)
    struct.pack_into("<IIQ", attr, 0, kind, _PERF_ATTR_SIZE, at_return)
    struct.pack_into("<QQ", attr, _PERF_ATTR_CONFIG1, ctypes.addressof(name), 0)
    buffer = ctypes.create_string_buffer(bytes(attr), _PERF_ATTR_SIZE)
    return _syscall(1, ctypes.addressof(buffer), -1, 0, -1, 8)


def attach_kprobe(symbol: str, program: int, *, at_return: bool) -> int:
    """Run a program at the first instruction or the return of a function, until the descriptor is closed."""
    event = open_kprobe(symbol, at_return=at_return)
    try:
        fcntl.ioctl(event, _PERF_SET_BPF, program)
        fcntl.ioctl(event, _PERF_ENABLE, 0)
    except OSError:
        os.close(event)
        raise
    return event


def reason(error: OSError) -> str:
    """The error by its name and text."""
    # Some errors of the kernel's BPF code have no name outside of it.
    name = errno.errorcode.get(error.errno or 0, {524: "ENOTSUPP"}.get(error.errno or 0, str(error.errno)))
    return f"{name} ({error.strerror})"


def _bpf(command: int, attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, max(len(attr), _SMALLEST_ATTR))
    return _syscall(0, command, ctypes.addressof(buffer), len(buffer))


def _syscall(which: int, *args: int) -> int:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, f"no call numbers for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(numbers[which]), *(ctypes.c_long(arg) for arg in args))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
