"""Finds out by trying what the running kernel lets BPF attach to, with programs of two instructions.

Speaks to the kernel through bpf(2) and perf_event_open(2) directly: the kernel's own errno is the answer,
bcc need not be there, and nothing stays attached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmatrace.btf import Btf
from vmatrace.kernel.plan import Probe

State = Literal["works", "missing", "refused"]

_SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}
_KPROBE_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")

# Commands, program types and attach types of bpf(2), by their numbers in the kernel's interface.
_PROG_LOAD, _RAW_TRACEPOINT_OPEN, _LINK_CREATE, _ITER_CREATE = 5, 17, 28, 33
_TYPE_RAW_TRACEPOINT, _TYPE_TRACING = 17, 26
_FENTRY, _FEXIT, _ITER = 24, 25, 28
# "r0 = 0; exit"
_NOTHING = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
_SMALLEST_ATTR = 64
_PERF_ATTR_SIZE, _PERF_ATTR_CONFIG1 = 112, 56


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one probe: it works, is missing from this kernel, or was refused, and why."""

    probe: Probe
    state: State
    reason: str

    @property
    def works(self) -> bool:
        """Whether the probe can be attached."""
        return self.state == "works"


def try_all(probes: Iterable[Probe], btf: Btf | None) -> tuple[Trial, ...]:
    """Tries each probe once: by trampoline, and where that does not work by kprobe.

    Every program is loaded, but only the first trampoline is attached: each costs the whole machine some
    milliseconds, and what stops one stops all.
    """
    trials: list[Trial] = []
    attached = False
    for probe in probes:
        trial = _try(probe, btf, attach=not attached)
        attached = attached or (probe.kind == "function" and trial.works)
        trials.append(trial)
    return tuple(trials)


def _try(probe: Probe, btf: Btf | None, attach: bool) -> Trial:
    if not probe.name:
        names = " or ".join(probe.wanted)
        why = "inlined, or not in this kernel" if probe.kind == "function" else "not in this kernel"
        return Trial(probe, "missing", f"{names}: {why}")
    attempts: tuple[tuple[str, Callable[[], str]], ...] = {
        "raw tracepoint": (("", lambda: _raw_tracepoint(probe.name)),),
        "iterator": (("", lambda: _iterator(probe.name, btf)),),
        "function": (
            ("trampoline: ", lambda: _trampoline(probe, btf, attach)),
            ("kprobe: ", lambda: _kprobe(probe)),
        ),
    }[probe.kind]
    reasons = []
    for label, attempt in attempts:
        try:
            return Trial(probe, "works", attempt())
        except OSError as error:
            reasons.append(label + _why(error))
    return Trial(probe, "refused", "; ".join(reasons))


def _raw_tracepoint(name: str) -> str:
    with _Fd(_load(_TYPE_RAW_TRACEPOINT)) as program, _Fd(_open_raw_tracepoint(name, program)):
        return "attached"


def _iterator(name: str, btf: Btf | None) -> str:
    target = None if btf is None else btf.function_id("bpf_iter_" + name)
    if target is None:
        raise OSError(errno.ENOENT, "BTF does not describe it")
    with _Fd(_load(_TYPE_TRACING, _ITER, target)) as program:
        create_link = struct.pack("<IIIIQI", program, 0, _ITER, 0, 0, 0)
        with (
            _Fd(_bpf(_LINK_CREATE, create_link)) as link,
            _Fd(_bpf(_ITER_CREATE, struct.pack("<II", link, 0))),
        ):
            return "attached"


def _trampoline(probe: Probe, btf: Btf | None, attach: bool) -> str:
    target = None if btf is None else btf.function_id(probe.name)
    if probe.symbol != probe.name:
        raise OSError(errno.ENOENT, f"the compiler made it {probe.symbol}")
    if target is None or not probe.traceable:
        raise OSError(errno.ENOENT, "BTF does not describe it")
    for attach_type in (_FENTRY, _FEXIT):
        with _Fd(_load(_TYPE_TRACING, attach_type, target)) as program:
            if attach:
                with _Fd(_open_raw_tracepoint("", program)):
                    continue
    return f"fentry and fexit {'attached' if attach else 'loaded'}"


def _kprobe(probe: Probe) -> str:
    try:
        kind = int(_KPROBE_TYPE.read_text())
    except (OSError, ValueError):
        raise OSError(errno.ENOENT, "not configured in this kernel") from None
    # struct perf_event_attr: type, size, config (bit 0: at return), then config1 (the name) at byte 56.
    name = ctypes.create_string_buffer(probe.symbol.encode())
    for at_return in (0, 1):
        attr = bytearray(_PERF_ATTR_SIZE)
        struct.pack_into("<IIQ", attr, 0, kind, _PERF_ATTR_SIZE, at_return)
        struct.pack_into("<QQ", attr, _PERF_ATTR_CONFIG1, ctypes.addressof(name), 0)
        with _Fd(_perf_event_open(bytes(attr))):
            continue
    return "kprobe and kretprobe attached"


def _load(kind: int, attach_type: int = 0, target: int = 0) -> int:
    code, licence = ctypes.create_string_buffer(_NOTHING), ctypes.create_string_buffer(b"GPL")
    attr = bytearray(120)
    struct.pack_into("<IIQQ", attr, 0, kind, 2, ctypes.addressof(code), ctypes.addressof(licence))
    struct.pack_into("<16s", attr, 48, b"vmatrace_trial")
    struct.pack_into("<I", attr, 68, attach_type)
    struct.pack_into("<I", attr, 108, target)
    return _bpf(_PROG_LOAD, bytes(attr))


def _open_raw_tracepoint(name: str, program: int) -> int:
    text = ctypes.create_string_buffer(name.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QI", ctypes.addressof(text) if name else 0, program))


def _bpf(command: int, attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, max(len(attr), _SMALLEST_ATTR))
    return _syscall(0, command, ctypes.addressof(buffer), len(buffer))


def _perf_event_open(attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, len(attr))
    return _syscall(1, ctypes.addressof(buffer), -1, 0, -1, 8)


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


def _why(error: OSError) -> str:
    # Some errors of the kernel's BPF code have no name outside of it.
    name = errno.errorcode.get(error.errno or 0, {524: "ENOTSUPP"}.get(error.errno or 0, str(error.errno)))
    return f"{name} ({error.strerror})"


class _Fd:
    """A file descriptor that is closed at the end of a with block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)
