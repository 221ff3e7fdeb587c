"""Address spaces as lines of text: those of /proc/PID/maps, with what decides merges beside each."""

from __future__ import annotations

from collections.abc import Iterator

from vmatrace.errors import escape
from vmatrace.ingest import FileInfo, Space, Trace
from vmatrace.timeline import Difference, Snapshot
from vmatrace.timeline.document import escape_path, generation, short_id
from vmatrace.vma import ACCESS, GROWSDOWN, MAY_ALL, MAYSHARE, MAYWRITE, SHARED, Vma, flag_names

_PLAIN = ACCESS | SHARED | MAYSHARE | MAY_ALL
_PATH_COLUMN = 73


def format_time(nanoseconds: int) -> str:
    """A time since the first record, in seconds to the microsecond."""
    return f"{nanoseconds / 1e9:.6f}s"


def render_snapshot(snapshot: Snapshot, trace: Trace, pid: int) -> Iterator[str]:
    """One state: a head line, then a line for each VMA and each interval that is not known."""
    number, total = generation(trace, pid, snapshot.space.id), len(trace.spaces_of(pid))
    since = format_time(snapshot.time - trace.records.first_time)
    life = "at its end" if snapshot.space.ended == snapshot.time else f"at {since}"
    yield (
        f"# PID {pid}{_named(snapshot.space)}, address space {snapshot.space.id} (generation {number} of {total}, "
        f"{_origin(snapshot.space)}), {life}: {len(snapshot.vmas)} VMAs"
    )
    lines = [(vma.start, render_vma(vma, trace, snapshot)) for vma in snapshot.vmas]
    lines += [(start, f"{start:08x}-{end:08x} unknown: nothing was read here since records were lost")
              for start, end in snapshot.unknown]  # fmt: skip
    for _, line in sorted(lines):
        yield line


def render_vma(vma: Vma, trace: Trace, snapshot: Snapshot | None = None) -> str:
    """One VMA as /proc/PID/maps shows it, then its other flags and identities."""
    info = trace.file_info(vma.file)
    device, inode = (info.device, info.ino) if info else ("00:00", 0)
    offset = vma.pgoff << trace.page_shift if vma.file is not None else 0
    line = f"{vma.start:08x}-{vma.end:08x} {permissions(vma)} {offset:08x} {device} {inode} "
    return f"{line:<{_PATH_COLUMN}}{_label(vma, info, snapshot)}  {_details(vma, snapshot)}".rstrip()


def permissions(vma: Vma) -> str:
    """``rwxp`` or ``rwxs`` as /proc/PID/maps has it."""
    access = "".join(letter if vma.flags >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    return access + ("s" if vma.flags & MAYSHARE else "p")


def render_difference(found: Difference, trace: Trace) -> Iterator[str]:
    """What differs: ``+`` a VMA that came, ``-`` one that went, ``<`` and ``>`` one that changed."""
    lines: list[tuple[int, int, str]] = [(vma.start, 0, "- " + render_vma(vma, trace)) for vma in found.removed]
    lines += [(vma.start, 1, "+ " + render_vma(vma, trace)) for vma in found.added]
    for before, after in found.changed:
        lines.append((after.start, 2, "< " + render_vma(before, trace)))
        lines.append((after.start, 3, "> " + render_vma(after, trace)))
    for _, _, line in sorted(lines):
        yield line


def _named(space: Space) -> str:
    return f" ({escape(space.comm)})" if space.comm else ""


def _origin(space: Space) -> str:
    return {"exec": "by exec", "fork": "by fork", "snapshot": "running already", "unknown": "birth not seen"}[
        space.origin
    ]


def _label(vma: Vma, info: FileInfo | None, snapshot: Snapshot | None) -> str:
    if info is not None:
        return escape(escape_path(info.path)) if info.path else "(file not described)"
    if vma.file is not None:
        return "(file not described)"
    if vma.name:
        return f"[anon:{escape(str(vma.name))}]"
    mm = snapshot.mm if snapshot is not None else None
    if mm and mm["start_brk"] and vma.start < mm["brk"] and vma.end > mm["start_brk"]:
        return "[heap]"
    if vma.flags & GROWSDOWN:
        return "[stack]"
    return "" if vma.anonymous else "(special)"


def _details(vma: Vma, snapshot: Snapshot | None) -> str:
    """What decides merges and is not in the maps line: flags, page offset, anon_vma and the rest."""
    words = flag_names(vma.flags & ~_PLAIN)
    if not vma.flags & MAYWRITE and not vma.flags & SHARED:
        words.append("no-MAYWRITE")
    found = ["|".join(words)] if words else []
    if vma.file is None:
        found.append(f"pgoff={vma.pgoff:x}")
    if vma.anon_vma is not None:
        found.append(f"anon_vma={short_id(vma.anon_vma):x}" + ("(forked)" if vma.forked else ""))
    elif snapshot is not None and vma.start in snapshot.anon_vma_since:
        found.append("anon_vma=?")
    for name, value in (("uffd", short_id(vma.uffd)), ("policy", vma.policy)):
        if value is not None:
            found.append(f"{name}={value:x}" if isinstance(value, int) else f"{name}={value}")
    if vma.close:
        found.append("close")
    return " ".join(found)
