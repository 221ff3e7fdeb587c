"""The forms in which VMAs, states and differences leave the program: plain values for JSON and CSV."""

from __future__ import annotations

from typing import Any, Final

from vmatrace.ingest import FileInfo, Trace
from vmatrace.ingest.objects import UNBORN
from vmatrace.schema import FILE_BITS
from vmatrace.timeline.space import Difference, Snapshot
from vmatrace.vma import Vma, flag_names

SCHEMA: Final = 1
FIRST_OLDER: Final = 1 << 52
"""Ids of objects that are older than the trace are shown from here on; below 2**53, which every reader of JSON keeps
exact."""


def short_id(identity: object) -> int | None:
    """An identity as a number below 2**53 that is the same in every output of one trace; None for none."""
    if not isinstance(identity, int):
        return None
    if identity >= UNBORN:
        return identity & FIRST_OLDER - 1 | FIRST_OLDER
    return identity >> 12 if identity >= FIRST_OLDER else identity


def escape_path(path: str) -> str:
    """The path as /proc/PID/maps escapes it: a newline is ``\\012``."""
    return path.replace("\n", "\\012")


def file_document(info: FileInfo | None) -> dict[str, Any]:
    """``path``, ``dev`` (major:minor in hex) and ``ino`` of a file, each None where it is not known."""
    if info is None:
        return {"path": None, "dev": None, "ino": None}
    return {"path": escape_path(info.path) if info.path else None, "dev": info.device, "ino": info.ino}


def hooks_document(info: FileInfo | None) -> dict[str, bool] | None:
    """Which mmap hooks a file has; ``inferred`` because the hooks were not seen being called."""
    if info is None:
        return None
    return {
        "mmap": bool(info.hooks & FILE_BITS["FILE_MMAP"]),
        "mmap_prepare": bool(info.hooks & FILE_BITS["FILE_MMAP_PREPARE"]),
        "inferred": True,
    }


def vma_document(vma: Vma, trace: Trace) -> dict[str, Any]:
    """One VMA: addresses in bytes, ``pgoff`` in pages, flags by the kernel's names without VM_."""
    info = trace.file_info(vma.file)
    return {
        "start": vma.start,
        "end": vma.end,
        "flags": flag_names(vma.flags),
        "pgoff": vma.pgoff,
        "file": None if vma.file is None else file_document(info),
        "hooks": None if vma.file is None else hooks_document(info),
        "anonymous": vma.anonymous,
        "close": vma.close,
        "anon_vma": short_id(vma.anon_vma),
        "forked": vma.forked,
        "uffd": short_id(vma.uffd),
        "policy": vma.policy,
        "name": vma.name,
        "object": short_id(vma.obj),
    }


def snapshot_document(snapshot: Snapshot, trace: Trace, pid: int) -> dict[str, Any]:
    """One state of one address space; times are ns since the trace's first record."""
    first = trace.records.first_time
    vmas = []
    for vma in snapshot.vmas:
        row = vma_document(vma, trace)
        if vma.start in snapshot.anon_vma_since:
            row["anon_vma_since"] = [time - first for time in snapshot.anon_vma_since[vma.start]]
        vmas.append(row)
    return {
        "pid": pid,
        "generation": generation(trace, pid, snapshot.space.id),
        "generations": len(trace.spaces_of(pid)),
        "space": snapshot.space.id,
        "origin": snapshot.space.origin,
        "time": snapshot.time - first,
        "complete": trace.complete,
        "alive": snapshot.space.ended is None,
        "mm": snapshot.mm,
        "vmas": vmas,
        "unknown": [list(interval) for interval in snapshot.unknown],
    }


def difference_document(found: Difference, trace: Trace) -> dict[str, Any]:
    """What differs between two states."""
    return {
        "added": [vma_document(vma, trace) for vma in found.added],
        "removed": [vma_document(vma, trace) for vma in found.removed],
        "changed": [
            {"before": vma_document(before, trace), "after": vma_document(after, trace)}
            for before, after in found.changed
        ],
    }


def generation(trace: Trace, pid: int, space: int) -> int:
    """Which of a process's address spaces this is, from 1: each exec begins another."""
    return [found.id for found in trace.spaces_of(pid)].index(space) + 1
