"""One operation as the trace has it: its call, its write sections, and what was read in them."""

from __future__ import annotations

import errno as errno_names
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from vmatrace.ingest.states import CUT, TELLING
from vmatrace.replay import evidence as second
from vmatrace.replay.files import HookSeen
from vmatrace.replay.stream import Call, Cover, OperationRow, Row, Section
from vmatrace.syscalls import SystemCall, call_name, find_call
from vmatrace.vma import GROWSDOWN, Vma

EVERYTHING: Final = (1 << 64) - 1
# Arguments that are addresses inside the caller's address space.
_ADDRESSES: Final = frozenset(("addr", "start", "new_addr", "shmaddr"))


class Walk(NamedTuple):
    """One walked interval: the VMAs are complete for ``[lo, hi)``, unless ``flags`` say why not.

    A walk that ran out of room is complete as far as it came.
    """

    lo: int
    hi: int
    flags: int
    vmas: list[Vma]


class Occurrence:
    """What the trace says of one operation. ``lost``: records of its address space are missing before it."""

    def __init__(
        self,
        columns: OperationRow,
        arch: str,
        sections: list[Section],
        call: Call | None,
        lost: bool,
        vma: Callable[[Row], Vma],
        interleaved: bool = False,
    ) -> None:
        self.columns = columns
        self.arch = arch
        self.sections = sections
        self.call = call
        #: The listed system call.
        self.entry: SystemCall | None = None if call is None else find_call(arch, call.abi, call.nr)
        self.lost = lost
        #: Another section of the address space lies between its own, of which only those before it are here.
        self.interleaved = interleaved
        #: What the decisions layer saw of the hook of the file that was mapped.
        self.hook: HookSeen | None = None
        if len(sections) == 1:
            self.events: Sequence[second.Event] = sections[0].evidence
        else:
            self.events = [event for section in sections for event in section.evidence]
        self.before: list[Walk] = []
        self.after: list[Walk] = []
        if sections:
            first = sections[0]
            self.before = _walks(first.before_cover, first.before, vma)
            for section in sections:
                self.after += _walks(section.after_cover, section.after, vma)

    @property
    def name(self) -> str:
        """The name of the call."""
        if self.entry is not None:
            return self.entry.name
        return "" if self.call is None else call_name(self.arch, self.call.abi, self.call.nr)

    @property
    def changed(self) -> bool:
        """Whether it changed a VMA, as far as the records tell."""
        return bool(self.columns.changed)

    @property
    def pid(self) -> int:
        """The process that did it, 0 where nobody did."""
        who = self.call or (self.sections[0] if self.sections else None)
        return who.pid if who is not None else 0

    @property
    def tid(self) -> int:
        """The task that did it, 0 where nobody did."""
        who = self.call or (self.sections[0] if self.sections else None)
        return who.tid if who is not None else 0

    @property
    def first_index(self) -> int:
        """Where it stands among all records."""
        return self.columns.order

    @property
    def last_index(self) -> int:
        """Where its last record stands among all records."""
        if self.call is not None:
            return self.call.place
        return self.sections[-1].place if self.sections else self.columns.order

    @property
    def downgraded(self) -> bool:
        """Whether others may have locked the mm for reading before the last read.

        What unmaps goes on with the lock downgraded.
        """
        return any(event[0] == second.UNMAPPED for event in self.events)

    @property
    def cut(self) -> bool:
        """Whether a walk afterwards ran out of room."""
        return any(flags & CUT for section in self.sections for _, _, flags, _ in section.after_cover)

    @property
    def unread_from(self) -> int | None:
        """Beyond this address VMAs may have changed and left no evidence: a walk ran out of room there."""
        quiet = [section for section in self.sections if section.op_class not in TELLING]
        ends = [end for section in quiet for _, end, flags, _ in section.after_cover if flags & CUT]
        return min(ends, default=None)

    @property
    def named(self) -> list[int]:
        """The addresses of this address space among the call's arguments."""
        if self.call is None or self.entry is None:
            return []
        pairs = zip(self.entry.arguments, self.call.args, strict=False)
        return [value for name, value in pairs if name in _ADDRESSES]

    def after_at(self, address: int) -> Vma | None:
        """The VMA read at ``address`` afterwards."""
        for walk in self.after:
            if walk.lo <= address < walk.hi:
                for vma in walk.vmas:
                    if vma.start <= address < vma.end:
                        return vma
        return None

    def after_in(self, start: int, end: int) -> list[Vma]:
        """The VMAs read in ``[start, end)`` afterwards."""
        return [vma for walk in self.after for vma in walk.vmas if vma.start < end and start < vma.end]

    def before_in(self, start: int, end: int) -> list[Vma]:
        """The VMAs read in ``[start, end)`` before."""
        return [vma for walk in self.before for vma in walk.vmas if vma.start < end and start < vma.end]

    def overwritten(self, at: int) -> bool:
        """Whether a later walk reads what walk ``at`` of ``after`` read."""
        walk = self.after[at]
        return any(later.lo < walk.hi and walk.lo < later.hi for later in self.after[at + 1 :])

    @cached_property
    def born(self) -> dict[int, tuple[int, int]]:
        """Objects born in the operation, with the range of their first store."""
        found: dict[int, tuple[int, int]] = {}
        for what, obj, start, end in self.events:
            if what in (second.ALLOC, second.DUP):
                found[obj] = (0, 0)
            elif what == second.STORE and found.get(obj) == (0, 0):
                found[obj] = (start, end)
        return found

    @property
    def grown_stack(self) -> int | None:
        """The new start of a stack, where its growth is all that the evidence tells."""
        if len(self.events) != 1 or self.events[0][0] != second.STORE:
            return None
        _, obj, start, _ = self.events[0]
        grown = any(v.obj == obj and v.flags & GROWSDOWN for walk in self.after for v in walk.vmas)
        return start if grown else None

    def released_uffd(self, held: set[Hashable]) -> Hashable:
        """The one userfaultfd context of ``held`` that is gone everywhere afterwards."""
        if not any(walk.lo == 0 and walk.hi == EVERYTHING for walk in self.after):
            return None
        gone = held - {vma.uffd for walk in self.after for vma in walk.vmas}
        return gone.pop() if len(gone) == 1 else None

    def text(self) -> str:
        """The call with its arguments and result, as strace would put it."""
        call, entry = self.call, self.entry
        if call is None:
            return ""
        names = entry.arguments if entry is not None else ()
        pairs = zip(names, call.args, strict=False)
        args = ", ".join(f"{name}={_argument(value)}" for name, value in pairs)
        result = errno_name(call.result) if -4096 < call.result < 0 else _argument(call.result)
        return f"{self.name}({args}) = {result}"


def _walks(covers: Sequence[Cover], rows: Sequence[Row], vma: Callable[[Row], Vma]) -> list[Walk]:
    found, at = [], 0
    for start, end, flags, count in covers:
        if end:
            found.append(Walk(start, end, flags & ~CUT, [vma(row) for row in rows[at : at + count]]))
        at += count
    return found


def errno_name(result: int) -> str:
    """The symbolic name of a failed call's result; of two names the kernel's own."""
    name = errno_names.errorcode.get(-result, str(result))
    return "EOPNOTSUPP" if name == "ENOTSUP" else name


def _argument(value: int) -> str:
    signed = value - (1 << 64) if value >> 63 else value
    return str(signed) if -4096 < signed < 4096 else hex(value)
