"""Finds out by trying what the running kernel lets BPF attach to, with programs of two instructions.

bcc need not be there, and nothing stays attached.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from vmatrace.btf import Btf
from vmatrace.capture import kernel_calls as calls
from vmatrace.kernel.plan import Probe

State = Literal["works", "missing", "refused"]

# "r0 = 0; exit"
_NOTHING = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)


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
        why = "inlined, not described by BTF, or " if probe.kind == "function" else ""
        return Trial(probe, "missing", f"{names}: {why}not in this kernel")
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
            reasons.append(label + calls.reason(error))
    return Trial(probe, "refused", "; ".join(reasons))


def _raw_tracepoint(name: str) -> str:
    with _Fd(_load(calls.TYPE_RAW_TRACEPOINT)) as program, _Fd(calls.attach_program(program, name)):
        return "attached"


def _iterator(name: str, btf: Btf | None) -> str:
    target = None if btf is None else btf.function_id("bpf_iter_" + name)
    if target is None:
        raise OSError(errno.ENOENT, "BTF does not describe it")
    with (
        _Fd(_load(calls.TYPE_TRACING, calls.ITER, target)) as program,
        _Fd(calls.link_iterator(program)) as link,
        _Fd(calls.run_iterator(link)),
    ):
        return "attached"


def _trampoline(probe: Probe, btf: Btf | None, attach: bool) -> str:
    target = None if btf is None else btf.function_id(probe.name)
    if probe.symbol != probe.name:
        raise OSError(errno.ENOENT, f"the compiler made it {probe.symbol}")
    if target is None or not probe.traceable:
        raise OSError(errno.ENOENT, "BTF does not describe it")
    for attach_type in (calls.FENTRY, calls.FEXIT):
        with _Fd(_load(calls.TYPE_TRACING, attach_type, target)) as program:
            if attach:
                with _Fd(calls.attach_program(program)):
                    continue
    return f"fentry and fexit {'attached' if attach else 'loaded'}"


def _kprobe(probe: Probe) -> str:
    for at_return in (False, True):
        with _Fd(calls.open_kprobe(probe.symbol, at_return=at_return)):
            continue
    return "kprobe and kretprobe attached"


def _load(kind: int, attach_type: int = 0, target: int = 0) -> int:
    return calls.load_program(kind, _NOTHING, attach_type=attach_type, target=target, name="vmatrace_trial")


class _Fd:
    """A file descriptor that is closed at the end of a with block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)
