"""One write section or operation as a value, decoded from the file when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vmatrace.ingest.effects import Effect, Evidence
from vmatrace.vma import Vma


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A mapped file. ``hooks``: 1 ``f_op->mmap``, 2 ``f_op->mmap_prepare``; ``dev``: major << 20 | minor."""

    id: int
    path: str
    dev: int
    ino: int
    mode: int
    fs_magic: int
    hooks: int

    @property
    def device(self) -> str:
        """``major:minor`` in hex as /proc/PID/maps shows it."""
        return f"{self.dev >> 20:02x}:{self.dev & 0xFFFFF:02x}"


@dataclass(frozen=True, slots=True)
class Walk:
    """The VMAs read in one walk; nothing else was in ``[start, end)``, if ``flags`` is 0."""

    start: int
    end: int
    flags: int
    vmas: tuple[Vma, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One write section: the state around its range when the lock was taken and when it was let go.

    ``number``: its place among all sections of the trace. Counters are pages, addresses bytes, times ns.
    VMAs have ``obj`` (an id that is never used again), ``anon_vma`` and ``uffd`` (opaque, None: none),
    ``policy`` (by content) and ``file``, the id of a FileInfo (`Trace.file_info`).
    """

    number: int
    index: int
    time: int
    acquired: int
    space: int
    seq: int
    pid: int
    tid: int
    kind: int
    op_class: int
    abi: int
    nr: int
    def_flags: int
    mm_flags: int
    brk_before: int
    start_brk: int
    brk: int
    map_count: int
    total_vm: int
    data_vm: int
    stack_vm: int
    locked_vm: int
    comm: str
    before: tuple[Walk, ...]
    after: tuple[Walk, ...]
    evidence: tuple[Evidence, ...]
    #: Its only effect is a stack that grew.
    grew: bool
    #: It changed a VMA.
    changed: bool
    #: Sections of this address space are missing before it.
    lost_before: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of one address space.

    ``n``: its number there; ``kind``: call, fork (the child's copy), exec, exit, fault or other; ``name``: of
    the system call (mmap2 and the multiplexed calls of 32-bit programs by their plain names, the arguments
    too), or the kind. ``result`` is None where the call did not return. ``effects``: counts by kind of
    effect; ``detail`` lists them. ``reason``: why nothing can be decided about it (kind other, lost records),
    else "".
    """

    space: int
    n: int
    kind: str
    name: str
    pid: int
    tid: int
    index: int
    time: int
    abi: int
    nr: int
    args: Mapping[str, int]
    result: int | None
    changed: bool
    reason: str
    #: map_count did not change as the effects say.
    miscounted: bool
    effects: Mapping[str, int]
    sections: tuple[Section, ...]
    detail: tuple[Effect, ...]
    #: The row of the table tasks (fork only).
    task: Mapping[str, Any] | None = None
    #: Arguments as the registers held them.
    raw_args: tuple[int, ...] = ()


@dataclass(slots=True)
class Space:
    """One address space. ``origin``: exec, fork, snapshot or unknown; ``pids``: the processes that lived in
    it."""

    id: int
    pid: int
    tid: int
    origin: str
    index: int
    time: int
    parent: int | None = None
    #: fork: the section of the parent in which it was copied, None where that is lost.
    fork_section: int | None = None
    fork_task: Mapping[str, Any] | None = None
    comm: str = ""
    #: When it died; None: it was alive when the recording ended.
    ended: int | None = None
    pids: list[int] = field(default_factory=list)
