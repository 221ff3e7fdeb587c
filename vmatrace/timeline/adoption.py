"""Which files are mapped how: through mmap_prepare, through ->mmap, or through the layer between the two.

With the decisions layer that is what was seen; without it, it is inferred from the hooks that the file has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from vmatrace.ingest import Decision, Descriptor, FileInfo, Operation, Trace
from vmatrace.schema import FILE_BITS
from vmatrace.timeline.document import escape_path
from vmatrace.timeline.events import mapped_file
from vmatrace.vma import flag_names

PREPARE: Final = "mmap_prepare"
MMAP: Final = "mmap"
COMPAT: Final = "compat"

_S_IFMT: Final = 0o170000
_S_IFREG: Final = 0o100000
# Names of file systems by s_magic (include/uapi/linux/magic.h and the file systems' own sources).
_NAMES: Final = {
    0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0xF2F52010: "f2fs", 0xE0F5E1E2: "erofs",
    0x73717368: "squashfs", 0x858458F6: "ramfs", 0x01021994: "tmpfs", 0x958458F6: "hugetlbfs", 0x4D44: "vfat",
    0x2011BAB0: "exfat", 0x9660: "iso9660", 0x7366746E: "ntfs3", 0x28CD3D45: "cramfs", 0x7275: "romfs",
    0x794C7630: "overlay", 0x65735546: "fuse", 0x6969: "nfs", 0xFF534D42: "cifs", 0xFE534D42: "smb3",
    0x01021997: "9p", 0x00C36400: "ceph", 0x5345434D: "secretmem", 0xA10A10A1: "aio", 0x09041934: "anon_inode",
    0x9FA0: "proc", 0x62656572: "sysfs", 0x64626720: "debugfs", 0x74726163: "tracefs", 0x27E0EB: "cgroup",
    0x63677270: "cgroup2", 0x534F434B: "sockfs", 0x50495045: "pipefs", 0x62646576: "bdev", 0xCAFE4A11: "bpf",
    0x64646178: "devdax", 0x444D4142: "dmabuf", 0xF15F: "ecryptfs", 0x73757245: "coda", 0x2FC12FC1: "zfs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mapped:
    """One mapping of a file: how it was made, and what the hook changed.

    ``via``: PREPARE, MMAP, COMPAT or "" (a file with neither hook); ``seen`` is False where that is inferred.
    ``hook``: the symbol of the function, where it was seen. ``changes``: what it changed, in words.
    """

    file: FileInfo
    via: str
    seen: bool
    hook: str
    merged: bool
    changes: tuple[str, ...]


@dataclass(slots=True)
class Adoption:
    """The mappings of one file system or driver, summed up."""

    name: str
    maps: int = 0
    via: dict[str, int] = field(default_factory=lambda: {PREPARE: 0, MMAP: 0, COMPAT: 0})
    merged: int = 0
    inferred: int = 0
    hooks: dict[str, None] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "files": len(self.files),
            "maps": self.maps,
            **self.via,
            "merged": self.merged,
            "inferred": self.inferred,
            "hooks": list(self.hooks),
            "changes": self.changes,
        }


def adoption(trace: Trace, pid: int | None = None) -> list[Adoption]:
    """How the files of a trace were mapped, by file system or driver, the most frequent first."""
    found: dict[str, Adoption] = {}
    for each in iter_mapped(trace, pid):
        name = driver_of(each.file)
        row = found.setdefault(name, Adoption(name))
        row.maps += 1
        row.merged += each.merged
        row.inferred += not each.seen
        row.files.add(each.file.path)
        if each.via:
            row.via[each.via] += 1
        if each.hook:
            row.hooks[each.hook] = None
        for change in each.changes:
            row.changes[change] = row.changes.get(change, 0) + 1
    return sorted(found.values(), key=lambda row: (-row.maps, row.name))


def driver_of(info: FileInfo) -> str:
    """The file system of a regular file; of any other the file itself: its driver is not its file system.

    The VMA of a stacked file (overlayfs) holds the file beneath, which is all that is known of it.
    """
    name = _NAMES.get(info.fs_magic, f"magic {info.fs_magic:#x}")
    if _is_shared_anonymous(info):
        return "shared anonymous memory"
    if info.hooks & FILE_BITS["FILE_STACKED"]:
        return f"stacked over {name}"
    if info.mode & _S_IFMT == _S_IFREG or name in ("secretmem", "aio", "hugetlbfs"):
        return name
    return escape_path(info.path) or name


def _is_shared_anonymous(info: FileInfo) -> bool:
    """Whether it is the file that stands behind MAP_SHARED | MAP_ANONYMOUS: made by mmap itself, no hook called."""
    return _NAMES.get(info.fs_magic) == "tmpfs" and info.path == "/dev/zero (deleted)"


def iter_mapped(trace: Trace, pid: int | None = None) -> Iterator[Mapped]:
    """Every mmap and shmat of a file that succeeded."""
    table = trace.operations
    rows = np.flatnonzero((table.changed != 0) & (table.call >= 0))
    for row in rows[np.argsort(table.order[rows], kind="stable")].tolist():
        operation = trace.operation(row)
        vma = mapped_file(operation)
        if vma is None or (pid is not None and operation.pid != pid):
            continue
        info = trace.file_info(vma.file)
        if info is not None:
            yield _mapped(trace, operation, info, trace.decisions.of(row))


def _mapped(trace: Trace, operation: Operation, info: FileInfo, made: Sequence[Decision]) -> Mapped:
    merged = operation.effects["merge"] > 0
    hook = next((each for each in made if each.what == "MMAP_PREPARE"), None)
    compat = any(each.what == "COMPAT_MMAP" for each in made)
    if hook is not None or compat:
        changes = changes_of(*hook.descs) if hook is not None and len(hook.descs) == 2 else ()
        function = hook.function if hook is not None else ""
        return Mapped(info, COMPAT if compat else PREPARE, True, function, merged, changes)
    prepare = bool(info.hooks & FILE_BITS["FILE_MMAP_PREPARE"])
    stacked = bool(info.hooks & FILE_BITS["FILE_STACKED"])
    via = (COMPAT if stacked else PREPARE) if prepare else MMAP if info.hooks & FILE_BITS["FILE_MMAP"] else ""
    if _is_shared_anonymous(info):
        return Mapped(info, "", True, "", merged, ())
    # That no hook was called is seen where hooks are probed; and an older kernel has none.
    seen = bool(made) and trace.decisions.sees("MMAP_PREPARE") and not prepare
    seen = seen or trace.feature("mmap_prepare") is False
    return Mapped(info, via, seen, "", merged, ())


def changes_of(before: Descriptor, after: Descriptor) -> tuple[str, ...]:
    """What a hook changed in its descriptor, in words."""
    found = [f"+{name}" for name in flag_names(after.flags & ~before.flags)]
    found += [f"-{name}" for name in flag_names(before.flags & ~after.flags)]
    found += [f"vm_ops {after.ops}"] if after.ops else []
    found += ["private data"] if after.private != before.private else []
    found += ["file"] if after.file != before.file else []
    found += ["pgoff"] if after.pgoff != before.pgoff else []
    found += ["action"] if after.action != before.action else []
    return tuple(found)
