"""Effects on kernels that need each section told by itself: where deaths are unseen, or splits store twice.

From 6.4 to 6.13 VMAs are freed after a grace period, long after the write section in which they left the
tree: who died is told from the VMAs that are there no more. Before 6.3 a split stores both of its pieces.
On arm64 a death does not tell its cause: only the range that was called for does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from vmatrace.ingest.changes import CHANGED
from vmatrace.ingest.effects import EFFECTS, FREED, MERGED, UNMAPPED, Effect, interpret
from vmatrace.ingest.match import sum_up
from vmatrace.ingest.views import Section
from vmatrace.schema import OP_CLASSES
from vmatrace.syscalls import find_call

if TYPE_CHECKING:
    from vmatrace.ingest.trace import Trace

Span = tuple[int, int]

_RANGES: Final = (OP_CLASSES["OP_RANGE"], OP_CLASSES["OP_MBIND"])
_MAPS: Final = (OP_CLASSES["OP_MMAP"], OP_CLASSES["OP_OLD_MMAP"])
_MREMAP: Final = OP_CLASSES["OP_MREMAP"]
DEATHS: Final = (MERGED, UNMAPPED, FREED)


def named_range(section: Section, args: tuple[int, ...], result: int | None, page_size: int) -> Span | None:
    """The range of addresses that the call of a section named or got; None where it has none."""
    if not args:
        return None
    if section.op_class in _RANGES:
        start, length = args[0], args[1]
    elif section.op_class in _MAPS and result is not None:
        start, length = result & (1 << 64) - 1, args[1]
    elif section.op_class == _MREMAP and result is not None:
        start, length = result & (1 << 64) - 1, args[2]
    else:
        return None
    return start, start + (length + page_size - 1) // page_size * page_size


def _told_as(arch: str, section: Section) -> int:
    """The class by which a section is told: remap_file_pages names a range, and maps it anew."""
    call = find_call(arch, section.abi, section.nr)
    return _MAPS[0] if call is not None and call.name == "remap_file_pages" else section.op_class


def section_effects(
    arch: str, section: Section, args: tuple[int, ...], result: int | None, page_size: int, deaths: bool
) -> list[Effect]:
    """The effects of one section; ``deaths``: the trace shows when VMA objects die."""
    before = [(obj, vma.start, vma.end) for walk in section.before for vma in walk.vmas if (obj := _id(vma.obj))]
    span = named_range(section, args, result, page_size)
    left = None
    if not deaths:
        left = {_id(vma.obj) for walk in section.after for vma in walk.vmas}
        # Nothing is known of what lies where nobody looked afterwards.
        left |= {obj for obj, lo, hi in before if not any(w.start <= lo and hi <= w.end for w in section.after)}
    return interpret(_told_as(arch, section), before, section.evidence, span, section.grew, left)


def recount(trace: Trace, numbers: Sequence[int] | None = None) -> None:
    """Count the effects of sections again, one by one; of all that changed anything where none are named."""
    records, operations = trace.records, trace.operations
    for name in EFFECTS:
        records.sections[name] = records.sections[name].astype(np.uint32)
    for number in np.flatnonzero(records.sections["changed"] == CHANGED).tolist() if numbers is None else numbers:
        row = int(operations.of_section[number])
        call = trace.call_of(row) if row >= 0 else ((), None)
        section = trace.section(number)
        found = section_effects(trace.arch, section, *call, trace.page_size, trace.deaths)
        for name in EFFECTS[:-1]:
            records.sections[name][number] = sum(effect.kind == name for effect in found)
        records.sections["victim"][number] = sum(len(effect.victims) for effect in found)
    sum_up(records, operations, trace.groups)


def _id(obj: object) -> int:
    return obj if isinstance(obj, int) else 0
