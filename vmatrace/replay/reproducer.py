"""Writes a small C program that repeats one divergence with mappings of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vmatrace.errors import UsageError
from vmatrace.ingest import Operation, Trace, errno_name
from vmatrace.replay.divergence import drawing
from vmatrace.replay.files import TMPFS, FileInfo, info_of
from vmatrace.replay.rebuild import Layout, rebuild
from vmatrace.replay.result import ReplayResult, Verdict
from vmatrace.replay.templates import MAIN, TOP
from vmatrace.rules.constants import MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MREMAP_FIXED
from vmatrace.vma import FLAG_BITS, Vma

# Arguments that are addresses inside the address space; all others go into the program as they are.
_ADDRESSES: Final = frozenset(("addr", "start", "new_addr"))
# Bytes on each side of the neighbourhood that the program keeps free (half of MAIN's margin).
_AROUND: Final = 1 << 20
_CALLS: Final = frozenset(
    (
        "mmap", "munmap", "mprotect", "pkey_mprotect", "mremap", "madvise", "mlock", "mlock2", "munlock",
        "mbind", "mseal", "remap_file_pages", "set_mempolicy_home_node",
    )
)  # fmt: skip
# What /proc/PID/smaps calls the flags (fs/proc/task_mmu.c, show_smap_vma_flags) that tell VMAs apart here.
_SMAPS: Final[dict[str, str]] = {
    "GROWSDOWN": "gd", "LOCKED": "lo", "SEQ_READ": "sr", "RAND_READ": "rr", "DONTCOPY": "dc",
    "DONTEXPAND": "de", "ACCOUNT": "ac", "NORESERVE": "nr", "WIPEONFORK": "wf", "DONTDUMP": "dd",
    "HUGEPAGE": "hg", "NOHUGEPAGE": "nh", "MERGEABLE": "mg", "SEALED": "sl", "UFFD_MISSING": "um",
    "UFFD_WP": "uw",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Case:
    """One divergence, its addresses still those of the trace."""

    verdict: Verdict
    operation: Operation
    layouts: dict[str, tuple[Vma, ...]]
    files: dict[object, FileInfo]
    page: int

    @property
    def low(self) -> int:
        """The first byte of the neighbourhood."""
        return min(self._edges())

    @property
    def high(self) -> int:
        """The end of the neighbourhood."""
        return max(self._edges())

    def _edges(self) -> list[int]:
        edges = [edge for vmas in self.layouts.values() for vma in vmas for edge in vma[:2]]
        return edges or [0, self.page]


def reproducer(trace: Trace, verdict: Verdict) -> str:
    """The text of the program for a FAILED verdict. Raises UsageError where none can repeat it."""
    case = _case(trace, verdict)
    return "".join(f"{line}\n" for line in _lines(case))


def can_repeat(verdict: Verdict) -> bool:
    """Whether `reproducer` knows how to write a program for this verdict."""
    return verdict.syscall in _CALLS and verdict.op >= 0 and any(vmas for _, vmas in verdict.layouts)


def first_reproducer(trace: Trace, result: ReplayResult) -> str:
    """The program for the first divergence that one can repeat, or nothing."""
    for verdict in result.failed:
        if can_repeat(verdict):
            return reproducer(trace, verdict)
    return ""


def _case(trace: Trace, verdict: Verdict) -> _Case:
    if not can_repeat(verdict):
        raise UsageError(f"no program can repeat this {verdict.syscall} with mappings of its own")
    operation = trace.operation(trace.operation_row(verdict.space, verdict.op))
    files: dict[object, FileInfo] = {}
    for row in trace.records.files:
        info = info_of(row)
        files[info.identity] = info
    layouts = {label: tuple(vma for vma in vmas if not _is_special(vma)) for label, vmas in verdict.layouts}
    return _Case(verdict, operation, layouts, files, trace.page_size)


def _is_special(vma: Vma) -> bool:
    """A mapping that a program cannot make again, such as [vvar]: it never merges and is left out."""
    return vma.file is None and not vma.anonymous


def repeating_program(
    verdict: Verdict,
    trace: Trace,
    layouts: Mapping[str, Sequence[Vma]],
    low: int,
    length: int,
    statements: Sequence[str],
) -> str:
    """The text of a program whose last statement does again what a FAILED verdict tells of.

    ``layouts`` (before, expected, observed) lie in ``length`` bytes from ``low``; the other statements make
    the first of them.
    """
    operation = trace.operation(trace.operation_row(verdict.space, verdict.op))
    lines = _program(
        _Text(
            verdict, trace.page_size, layouts, low, length, [f"{line};" for line in statements[:-1]],
            [f"return {statements[-1]};"], errno_name(operation.result) or "0",
        )
    )  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def _lines(case: _Case) -> Iterator[str]:
    steps = rebuild(Layout(case.layouts["before"], case.low, case.page, _file_kinds(case)))
    yield from _program(
        _Text(
            case.verdict, case.page, case.layouts, case.low, case.high - case.low, list(steps),
            list(_operation(case)), _observed_errno(case),
        )
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Text:
    """The parts of a program that differ from one divergence to the next."""

    verdict: Verdict
    page: int
    layouts: Mapping[str, Sequence[Vma]]
    low: int
    length: int
    rebuild: Sequence[str]
    operation: Sequence[str]
    observed_errno: str


def _program(text: _Text) -> Iterator[str]:
    verdict = text.verdict
    yield "/*"
    yield f" * {_comment(verdict.call or verdict.syscall)}"
    yield f" * operation {verdict.op} of process {verdict.pid}: {_comment(verdict.reason)}"
    if verdict.rule:
        yield f" * rules that decided: {', '.join(verdict.rules)}"
    yield " *"
    yield from (f" *   {_comment(line)}" for line in drawing(verdict, text.page))
    yield " *"
    yield " * Exit status: 0 as the rules expect, 1 as the trace shows, 2 neither, 3 the layout could not be"
    yield " * rebuilt."
    yield " */"
    yield from TOP.strip("\n").splitlines()
    yield ""
    for label in ("before", "expected", "observed"):
        yield from _layout(label, text.layouts[label], text.low)
    yield ""
    yield "static void rebuild(void)"
    yield "{"
    yield from (f"\t{line}" for line in text.rebuild)
    yield "}"
    yield ""
    yield "static long operation(void)"
    yield "{"
    yield from (f"\t{line}" for line in text.operation)
    yield "}"
    yield ""
    main = MAIN.replace("@LENGTH@", hex(text.length)).replace("@REASON@", _string(verdict.reason))
    main = main.replace("@EXPECTED@", _errno_of(verdict.expected)).replace("@OBSERVED@", text.observed_errno)
    yield from main.strip("\n").splitlines()


def _comment(text: str) -> str:
    return text.encode("ascii", "replace").decode().replace("*/", "* /")


def _string(text: str) -> str:
    return json.dumps(_comment(text))


def _layout(label: str, vmas: Sequence[Vma], low: int) -> Iterator[str]:
    yield f"static const struct area {label}[] = {{"
    for vma in vmas:
        codes = " ".join(code for name, code in _SMAPS.items() if vma.flags & FLAG_BITS[name])
        rights = "".join(letter if vma.flags >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
        rights += "s" if vma.flags & FLAG_BITS["MAYSHARE"] else "p"
        yield f'\t{{ {vma.start - low:#x}, {vma.end - low:#x}, "{rights}", "{codes}" }},'
    yield '\t{ 0, 0, "", "" },'
    yield "};"


def _file_kinds(case: _Case) -> dict[object, str]:
    """For each file of the layouts what stands in for it: memory, disk or zero."""
    found: dict[object, str] = {}
    for vmas in case.layouts.values():
        for vma in vmas:
            if vma.file is not None:
                found.setdefault(vma.file, _kind(case.files.get(vma.file)))
    return found


def _kind(info: FileInfo | None) -> str:
    if info is None or info.magic == TMPFS:
        return "memory"
    return "zero" if info.private_zero else "disk"


def _operation(case: _Case) -> Iterator[str]:
    operation = case.operation
    args = dict(operation.args)
    fd = "-1"
    _place_as_picked(args, operation)
    if operation.name == "mmap" and not args["flags"] & MAP_ANONYMOUS:
        fd = _descriptor(case)
    words = []
    for name, value in args.items():
        if name in _ADDRESSES and case.low - _AROUND <= value <= case.high + _AROUND:
            words.append(f"area {'-' if value < case.low else '+'} {abs(value - case.low):#x}")
        elif name == "fd":
            words.append(fd)
        elif name == "nmask":
            words.append("&nodes" if value else "NULL")
            if value:
                yield f"unsigned long nodes = {value:#x};"
        else:
            words.append(f"{value:#x}ul")
    padded = words + ["0"] * (6 - len(words))
    if fd.startswith("file("):
        yield f"int fd = {fd};"
        padded = ["fd" if word == fd else word for word in padded]
    yield ""
    yield f"return syscall(SYS_{operation.name}, {', '.join(padded)});"


def _place_as_picked(args: dict[str, int], operation: Operation) -> None:
    """Where the kernel chose, the program asks for that place, which is free in its own area too."""
    result = operation.result
    if result is None or result < 0:
        return
    if operation.name == "mmap" and not args["flags"] & (MAP_FIXED | MAP_FIXED_NOREPLACE):
        args["addr"] = result
    if operation.name == "mremap" and not args["flags"] & MREMAP_FIXED and result != args["addr"]:
        args["flags"] |= MREMAP_FIXED
        args["new_addr"] = result


def _descriptor(case: _Case) -> str:
    result = case.operation.result
    for vma in case.layouts["observed"]:
        if result is not None and vma.start <= result < vma.end and vma.file is not None:
            kinds = _file_kinds(case)
            return f"file({list(kinds).index(vma.file)}, {kinds[vma.file].upper()})"
    return f"file({len(_file_kinds(case))}, MEMORY)"


def _errno_of(text: str) -> str:
    return text if re.fullmatch(r"E[A-Z0-9]+", text) else "0"


def _observed_errno(case: _Case) -> str:
    return errno_name(case.operation.result) or "0"
