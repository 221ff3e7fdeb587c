"""The decisions layer on the running kernel: its programs loaded once for each function, attached, and let go.

Which functions, and what each shows, is the plan's to say (`vmatrace.kernel.functions`); which of their arguments is
what, that of `vmatrace.capture.parameters`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vmatrace.btf import Btf
from vmatrace.capture import kernel_calls as calls
from vmatrace.capture.bcc import Program
from vmatrace.capture.headers import function_names
from vmatrace.capture.parameters import BASE, PARAMETERS, parameters
from vmatrace.capture.probe_trials import try_all
from vmatrace.errors import CannotTrace
from vmatrace.kernel.functions import decisions_plan
from vmatrace.kernel.plan import Probe

SOURCES = ("question.c", "answer.c")
Way = Literal["fentry", "kprobe"]
WAYS: tuple[Way, ...] = ("fentry", "kprobe")

_TRIAL = "__split_vma"
_AT_THE_CALL = ("VMA_FREE",)  # told at once, their return is not probed: bpf/decisions/answer.c says why
_MOVE_NUMBER = 0xB7  # "register = number", one instruction


@dataclass(frozen=True, slots=True)
class Attached:
    """A function of the plan, probed; ``how`` it is."""

    probe: Probe
    how: Way


@dataclass(frozen=True, slots=True)
class Missing:
    """A function of the plan that is not probed, and why not."""

    probe: Probe
    reason: str


def decisions_wanted(layer: str, btf: Btf) -> tuple[Probe, ...]:
    """The plan, where decisions are wanted and this kernel lets us probe functions; else empty.

    ``layer``: what the user asked for; "auto" takes what is there, "decisions" raises `CannotTrace` without it. One
    function that every kernel has is tried first: where that is refused, nothing costs any time.
    """
    if layer == "operations":
        return ()
    known = Probe("decisions", "function", _TRIAL, (_TRIAL,), "", "", symbol=_TRIAL, traceable=True)
    (trial,) = try_all((known,), btf)
    if trial.works:
        return decisions_plan(btf, function_names())
    if layer == "decisions":
        raise CannotTrace(
            f"decisions layer: this kernel lets no function be probed: {trial.reason}",
            "record --layer operations, or on another kernel: vmatrace lab run",
        )
    return ()


class Decisions:
    """The decisions layer of a loaded program. `attach` arms it, `close` disarms it."""

    def __init__(self, program: Program, plan: Iterable[Probe], btf: Btf, ways: Iterable[Way] = WAYS) -> None:
        self._program = program
        self._plan = tuple(plan)
        self._btf = btf
        self._ways = tuple(ways)
        self._fds: list[int] = []
        self._programs: list[int] = []
        self.attached: list[Attached] = []
        self.missing: list[Missing] = []

    def attach(self, layer: str = "auto", say: Callable[[str], None] = lambda text: None) -> bool:
        """Probe every function of the plan, each in the first way that works; what cannot be is in ``missing``.

        False where none could be; raises `CannotTrace` then if ``layer`` says that decisions were asked for.
        """
        self._attach_all()
        say(self.summary())
        if not self.attached and layer == "decisions":
            why = self.missing[0].reason if self.missing else "none is known"
            raise CannotTrace(f"decisions layer: no function could be probed: {why}", "run `vmatrace doctor`")
        return bool(self.attached)

    def _attach_all(self) -> None:
        for probe in self._plan:
            if not probe.name:
                self.missing.append(Missing(probe, "inlined, not described by BTF, or not in this kernel"))
                continue
            reasons = []
            for way in self._ways:
                try:
                    self._attach(probe, way)
                except OSError as error:
                    reasons.append(f"{way}: {calls.reason(error)}")
                except CannotTrace as error:  # BTF lacks a struct that the function works on
                    reasons.append(error.message)
                else:
                    self.attached.append(Attached(probe, way))
                    break
            else:
                self.missing.append(Missing(probe, "; ".join(reasons)))

    def header(self) -> dict[str, Any]:
        """What a trace's header says of the layer: the probes in the order of their numbers, and what is lost."""
        hows = {found.how for found in self.attached}
        return {
            "how": hows.pop() if len(hows) == 1 else "mixed",
            "probes": [
                {"function": at.probe.name, "symbol": at.probe.symbol, "how": at.how, "what": at.probe.what}
                for at in self.attached
            ],
            "missing": [
                {
                    "function": " or ".join(gap.probe.wanted),
                    "what": gap.probe.what,
                    "lost": gap.probe.lost,
                    "reason": gap.reason,
                }
                for gap in self.missing
            ],
        }

    def summary(self) -> str:
        """What is probed and what is not, in a line."""
        missing = ", ".join(gap.probe.wanted[0] for gap in self.missing)
        return f"decisions: {len(self.attached)} functions probed" + (f"; not {missing}" if missing else "")

    def hooks(self) -> list[str]:
        """The symbol of each probe by its number, empty where it is not on a file's hook."""
        return [at.probe.symbol if at.probe.what == "MMAP_PREPARE" else "" for at in self.attached]

    def misses(self) -> int:
        """How often the kernel did not run a program of ours, since it ran on that processor already."""
        return sum(_recursion_misses(fd) for fd in self._programs)

    def close(self) -> None:
        """Take all probes away."""
        for fd in [*self._fds, *self._programs]:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()
        self._programs.clear()

    def _attach(self, probe: Probe, way: Way) -> None:
        values = parameters(probe, len(self.attached), self._btf)
        programs: list[int] = []
        fds: list[int] = []
        try:
            # The return first: no call is begun that would not be ended, a return without its call is passed over.
            sides = ("enter",) if probe.what in _AT_THE_CALL else ("leave", "enter")
            for side in sides:
                programs.append(self._load(probe, way, side, values))
            attach = _attach_trampoline if way == "fentry" else _attach_kprobe
            for side, program in zip(sides, programs, strict=True):
                fds.append(attach(probe, program, side))
        except OSError:
            for fd in [*fds, *programs]:
                os.close(fd)
            raise
        self._fds += fds
        self._programs += programs

    def _load(self, probe: Probe, way: Way, side: str, values: Mapping[str, int]) -> int:
        kind = "function" if way == "fentry" else "kprobe"
        code = with_parameters(self._program.code(f"{side}_{kind}"), values)
        if way == "kprobe":
            return calls.load_program(calls.TYPE_KPROBE, code, name=f"vmat_{side}")
        target = self._btf.function_id(probe.name) if probe.traceable else None
        if target is None:
            raise OSError(2, "BTF does not describe it" if probe.symbol == probe.name else f"it is {probe.symbol}")
        attach_type = calls.FENTRY if side == "enter" else calls.FEXIT
        return calls.load_program(
            calls.TYPE_TRACING, code, attach_type=attach_type, target=target, name=f"vmat_{side}"
        )


def with_parameters(code: bytes, values: Mapping[str, int]) -> bytes:
    """The program for one function: its parameters' numbers written into the instructions that wait for them."""
    patched = bytearray(code)
    for at in range(0, len(code), 8):
        if code[at] == _MOVE_NUMBER:
            (number,) = struct.unpack_from("<I", code, at + 4)
            if BASE <= number < BASE + len(PARAMETERS):
                struct.pack_into("<I", patched, at + 4, values[PARAMETERS[number - BASE]])
    return bytes(patched)


def _attach_trampoline(probe: Probe, program: int, side: str) -> int:
    return calls.attach_program(program)


def _attach_kprobe(probe: Probe, program: int, side: str) -> int:
    return calls.attach_kprobe(probe.symbol, program, at_return=side == "leave")


def _recursion_misses(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        for line in info:
            if line.startswith("recursion_misses"):
                return int(line.split()[1])
    return 0
