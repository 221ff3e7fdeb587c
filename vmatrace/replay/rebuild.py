"""The C statements that rebuild a neighbourhood of VMAs: maps, faults, forks, protections, advice."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from vmatrace.rules.model import Policy
from vmatrace.vma import (
    ACCESS,
    ACCOUNT,
    DONTCOPY,
    DONTDUMP,
    EXEC,
    GROWSDOWN,
    HUGEPAGE,
    LOCKED,
    LOCKONFAULT,
    MAYSHARE,
    MERGEABLE,
    NOHUGEPAGE,
    NORESERVE,
    RAND_READ,
    READ,
    SEALED,
    SEQ_READ,
    SHARED,
    WIPEONFORK,
    WRITE,
    Vma,
)  # fmt: skip

_ADVICE: Final = (
    (DONTCOPY, "MADV_DONTFORK"), (DONTDUMP, "MADV_DONTDUMP"), (WIPEONFORK, "MADV_WIPEONFORK"),
    (SEQ_READ, "MADV_SEQUENTIAL"), (RAND_READ, "MADV_RANDOM"), (HUGEPAGE, "MADV_HUGEPAGE"),
    (NOHUGEPAGE, "MADV_NOHUGEPAGE"), (MERGEABLE, "MADV_MERGEABLE"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What is to be rebuilt: VMAs at the trace's addresses, the lowest one, what stands in for each file."""

    vmas: Sequence[Vma]
    low: int
    page: int
    files: Mapping[object, str]


def rebuild(layout: Layout) -> Iterator[str]:
    """The statements, one a line."""
    groups = _groups(layout.vmas)
    forked = [group for group in groups if group[0].forked]
    for number, group in enumerate(forked):
        yield from _faulted(layout, group, number)
    if forked:
        yield "go_on_in_a_child();"
    for number, group in enumerate(group for group in groups if not group[0].forked):
        yield from _faulted(layout, group, number)
    for vma in layout.vmas:
        if vma.anon_vma is None:
            yield _mapped(
                layout, vma, vma.start, vma.end, vma.flags & ACCESS | (WRITE if _charged(vma) else 0)
            )
    for vma in layout.vmas:
        yield from _finish(layout, vma)
    for vma in layout.vmas:
        if vma.flags & SEALED:
            yield f'check(syscall(SYS_mseal, {_range(layout, vma)}, 0), "mseal");'


def _groups(vmas: Sequence[Vma]) -> list[list[Vma]]:
    """The faulted VMAs by their anon_vma and page offset: those of one group were one VMA once."""
    found: dict[tuple[Hashable, ...], list[Vma]] = {}
    for vma in vmas:
        if vma.anon_vma is not None:
            found.setdefault((vma.anon_vma, vma.file, vma.forked), []).append(vma)
    return list(found.values())


def _charged(vma: Vma) -> bool:
    """Accounted though not writable: it was mapped writable."""
    return bool(vma.flags & ACCOUNT)


def _range(layout: Layout, vma: Vma) -> str:
    return f"area + {vma.start - layout.low:#x}, {vma.length:#x}"


def _rights(flags: int) -> str:
    names = [
        name for bit, name in ((READ, "PROT_READ"), (WRITE, "PROT_WRITE"), (EXEC, "PROT_EXEC")) if flags & bit
    ]
    return " | ".join(names) or "PROT_NONE"


def _map_flags(vma: Vma) -> str:
    words = ["MAP_SHARED" if vma.flags & (SHARED | MAYSHARE) else "MAP_PRIVATE"]
    if vma.file is None:
        words.append("MAP_ANONYMOUS")
    if vma.flags & NORESERVE:
        words.append("MAP_NORESERVE")
    if vma.flags & GROWSDOWN:
        words.append("MAP_GROWSDOWN")
    return " | ".join(words)


def _mapped(layout: Layout, vma: Vma, start: int, end: int, access: int) -> str:
    fd, offset = "-1", 0
    if vma.file is not None:
        fd = f"file({list(layout.files).index(vma.file)}, {layout.files[vma.file].upper()})"
        offset = vma.pgoff * layout.page + start - vma.start
    place = f"{start - layout.low:#x}, {end - start:#x}"
    return f"map({place}, {_rights(access)}, {_map_flags(vma)}, {fd}, {max(offset, 0):#x});"


def _faulted(layout: Layout, group: list[Vma], number: int) -> Iterator[str]:
    """One map over the whole group, one fault in it; what lies between its VMAs is unmapped again."""
    first, start, end = group[0], group[0].start, group[-1].end
    moved = (first.pgoff * layout.page - first.start) if first.file is None else 0
    if moved:
        flags = _map_flags(first)
        yield f"map_moved({start - layout.low:#x}, {end - start:#x}, {flags}, {_signed(moved)});"
    else:
        yield _mapped(layout, first, start, end, READ | WRITE)
        # Set apart while it is faulted, so that it does not take a neighbour's anon_vma.
        apart = f"area + {start - layout.low:#x}, {end - start:#x}"
        if number % 2:
            yield f'check(madvise({apart}, MADV_DONTDUMP), "madvise");'
        yield f"touch({start - layout.low:#x});"
        if number % 2:
            yield f'check(madvise({apart}, MADV_DODUMP), "madvise");'
    for below, above in pairwise(group):
        if below.end < above.start:
            yield f"munmap(area + {below.end - layout.low:#x}, {above.start - below.end:#x});"


def _signed(value: int) -> str:
    return hex(value) if value >= 0 else f"-{-value:#x}"


def _finish(layout: Layout, vma: Vma) -> Iterator[str]:
    """Protection, advice, policy and locks of one VMA."""
    here = _range(layout, vma)
    if vma.anon_vma is not None or _charged(vma):
        yield f'check(mprotect({here}, {_rights(vma.flags)}), "mprotect");'
    for bit, name in _ADVICE:
        if vma.flags & bit:
            yield f'check(madvise({here}, {name}), "madvise");'
    if isinstance(vma.policy, Policy) and vma.policy.mode >= 0:
        yield f"{{ unsigned long nodes = {max(vma.policy.nodes, 0):#x};"
        mask = ("&nodes", "64") if vma.policy.nodes else ("NULL", "0")
        bind = f"syscall(SYS_mbind, {here}, {vma.policy.mode}, {mask[0]}, {mask[1]}, 0)"
        yield f'  check({bind}, "mbind"); (void)nodes; }}'
    if vma.flags & LOCKED:
        onfault = 1 if vma.flags & LOCKONFAULT else 0
        yield f'check(syscall(SYS_mlock2, {here}, {onfault}), "mlock2");'
