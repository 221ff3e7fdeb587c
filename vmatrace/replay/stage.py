"""Steps as C text and as scenario operations, their addresses moved into one free area."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmatrace.ingest import FileInfo, Trace
from vmatrace.replay.files import SECRETMEM, TMPFS
from vmatrace.replay.history import FORK, TOUCH, Step
from vmatrace.replay.templates import STAGE, TOP
from vmatrace.rules.constants import MAP_ANONYMOUS

# Where scenarios have the area.
SCENARIO_BASE: Final = 0x10000000
# Of these the kernel takes 32 bits, with a sign.
_INTS: Final = frozenset(("pkey", "behavior", "mode", "flags"))
_ADDRESSES: Final = frozenset(("addr", "start", "new_addr"))
# Free room between stretches that were far from each other, and at both ends; keeps huge pages where they were.
_HUGE: Final = 2 << 20
_FAR: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Places:
    """Where each stretch of the trace's addresses lies in the area: (low, high, offset of low)."""

    stretches: tuple[tuple[int, int, int], ...]
    length: int

    def offset(self, address: int) -> int | None:
        """The offset in the area, None for an address that belongs to no stretch."""
        for low, high, at in self.stretches:
            if low - _HUGE < address < high + _HUGE:
                return address - low + at
        return None


def places_of(steps: Sequence[Step]) -> Places:
    """Room for everything that the steps name."""
    ranges = sorted(found for step in steps for found in step.ranges() if found[1] - found[0] < _FAR << 8)
    merged: list[list[int]] = []
    for low, high in ranges:
        if merged and low <= merged[-1][1] + 2 * _HUGE:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    stretches, cursor = [], 0
    for low, high in merged:
        at = cursor + 2 * _HUGE + low % _HUGE
        stretches.append((low, high, at))
        cursor = (at + high - low) // _HUGE * _HUGE + _HUGE
    return Places(tuple(stretches), cursor + 2 * _HUGE)


@dataclass(frozen=True, slots=True)
class Stage:
    """What gives steps their text: the places, and the files of the trace in the order of their numbers."""

    places: Places
    files: tuple[object, ...]
    infos: dict[object, FileInfo]

    def statement(self, step: Step) -> str:
        """The C expression that does the step."""
        if step.kind == FORK:
            return "go_on_in_a_child()"
        if step.kind == TOUCH:
            return f"poke({self._address(step.args['addr'])})"
        words = [self._word(step, name, value) for name, value in step.args.items() if name not in ("soft", "hard")]
        return f"syscall(SYS_{step.name}, {', '.join(words + ['0'] * (6 - len(words)))})"

    def _word(self, step: Step, name: str, value: int) -> str:
        if name in _ADDRESSES:
            return self._address(value)
        if name == "fd":
            return "-1" if step.args["flags"] & MAP_ANONYMOUS else self._descriptor(step.file)
        if name == "nmask":
            return f"nodes({value:#x})" if value else "NULL"
        if name in ("rlim", "new_rlim"):
            return f"limit({step.args['soft']:#x}ul, {step.args['hard']:#x}ul)" if value else "NULL"
        return "NULL" if name == "old_rlim" else f"{value:#x}ul"

    def _address(self, value: int) -> str:
        offset = self.places.offset(value)
        return f"{value:#x}ul" if offset is None else f"area + {offset:#x}"

    def _descriptor(self, file: object) -> str:
        if file not in self.infos:
            return "9999"
        return f"file({self.files.index(file)}, {kind_of_file(self.infos[file]).upper()})"

    def scenario(self, step: Step, result: int | None) -> dict[str, Any] | None:
        """The operation of a scenario, None for a step that has none there."""
        if step.kind == FORK:
            return {"op": "fork", "follow": 1}
        if step.kind == TOUCH:
            return {"op": "fault", "address": self._moved(step.args["addr"]), "write": 1}
        if step.name in ("setrlimit", "prlimit64", "personality"):
            return None
        made: dict[str, Any] = {"op": step.name}
        for name, value in step.args.items():
            if name not in ("fd", "soft", "hard"):
                made[name] = self._moved(value) if name in _ADDRESSES else _int(value) if name in _INTS else value
        if step.name == "mmap":
            if result is not None and result >= 0:
                made["picked"] = made["addr"]
            if step.file in self.infos and not step.args["flags"] & MAP_ANONYMOUS:
                made["file"] = {"identity": f"file{self.files.index(step.file)}", "kind": self._kind(step.file)}
        return made

    def _kind(self, file: object) -> str:
        return {"memory": "shmem", "secret": "secretmem", "zero": "zero", "disk": ""}[kind_of_file(self.infos[file])]

    def _moved(self, value: int) -> int:
        offset = self.places.offset(value)
        return value if offset is None else SCENARIO_BASE + offset


def stage_of(trace: Trace, steps: Sequence[Step]) -> Stage:
    """The stage for these steps of a trace."""
    files = tuple(dict.fromkeys(step.file for step in steps if step.file is not None))
    infos = {file: info for file in files if (info := trace.file_info(file)) is not None}
    return Stage(places_of(steps), files, infos)


def _int(value: int) -> int:
    return (value & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)


def kind_of_file(info: FileInfo) -> str:
    """What stands in for a file: memory, disk, zero or secret."""
    if info.fs_magic == TMPFS:
        return "memory"
    if info.fs_magic == SECRETMEM:
        return "secret"
    return "zero" if info.path == "/dev/zero" else "disk"


def program(stage: Stage, steps: Sequence[Step], candidates: Sequence[Sequence[int]]) -> str:
    """A C program that goes through each candidate (numbers of steps) in a child of its own."""
    return "\n".join(_lines(stage, steps, candidates)) + "\n"


def _lines(stage: Stage, steps: Sequence[Step], candidates: Sequence[Sequence[int]]) -> Iterator[str]:
    yield TOP.strip("\n")
    used = sorted({number for candidate in candidates for number in candidate})
    for number in used:
        yield f"static void step_{number}(void) {{ {stage.statement(steps[number])}; }}"
    yield "static void (*const steps[])(void) = {"
    yield from (f"\tstep_{number}," for number in used)
    yield "};"
    places = {number: at for at, number in enumerate(used)}
    for at, candidate in enumerate(candidates):
        words = ", ".join(str(places[number]) for number in candidate)
        yield f"static const int candidate_{at}[] = {{ {words}, -1 }};"
    yield "static const int *const candidates[] = {"
    yield from (f"\tcandidate_{at}," for at in range(len(candidates)))
    yield "\tNULL,"
    yield "};"
    yield STAGE.replace("@LENGTH@", hex(stage.places.length)).strip("\n")
