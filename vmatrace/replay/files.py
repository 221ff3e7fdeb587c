"""What is known of a mapped file: its kind, and what its driver does to a mapping, by table or learnt."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from vmatrace.rules.model import FileGiven
from vmatrace.schema import FILE_BITS
from vmatrace.vma import (
    ACCESS,
    DONTCOPY,
    DONTDUMP,
    DONTEXPAND,
    HUGEPAGE,
    HUGETLB,
    IO,
    LOCKED,
    MAYEXEC,
    MAYREAD,
    MAYSHARE,
    MAYWRITE,
    MIXEDMAP,
    PFNMAP,
    SHARED,
    Vma,
)  # fmt: skip

#: Flags that a driver may be learnt to set or clear (design, section 6); anything else is left undecided.
LEARNABLE: Final = (
    IO | PFNMAP | MIXEDMAP | DONTEXPAND | DONTDUMP | DONTCOPY | LOCKED | HUGEPAGE | MAYREAD | MAYWRITE | MAYEXEC
)

TMPFS: Final = 0x01021994
HUGETLBFS: Final = 0x958458F6
SECRETMEM: Final = 0x5345434D
AIO: Final = 0xA10A10A1
OVERLAY: Final = 0x794C7630
_S_IFMT: Final = 0o170000
_S_IFREG: Final = 0o100000
# File systems whose maps of regular files set no flag and have no close hook, by s_magic: ext2-4, xfs,
# btrfs, f2fs, erofs, squashfs, ramfs, vfat, exfat, iso9660, ntfs3, cramfs, romfs, tmpfs.
_ORDINARY: Final = frozenset(
    (
        0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0xE0F5E1E2, 0x73717368, 0x858458F6, 0x4D44, 0x2011BAB0,
        0x9660, 0x7366746E, 0x28CD3D45, 0x7275, TMPFS,
    )
)  # fmt: skip
_SHARED_ZERO: Final = "/dev/zero (deleted)"
_DEFAULT_HUGE: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One struct file as the trace describes it."""

    identity: int
    #: Where the description stands among all records.
    place: int
    mode: int
    magic: int
    bits: int
    path: str

    @property
    def regular(self) -> bool:
        """Whether it is a regular file."""
        return self.mode & _S_IFMT == _S_IFREG

    @property
    def ordinary(self) -> bool:
        """Whether its maps set no flag and have no close hook: a regular file of a known file system."""
        return self.regular and self.magic in _ORDINARY

    @property
    def shared_zero(self) -> bool:
        """Whether it stands behind shared anonymous memory or a shared map of /dev/zero."""
        return self.magic == TMPFS and self.path == _SHARED_ZERO

    @property
    def private_zero(self) -> bool:
        """Whether it is the device /dev/zero: private maps of it are anonymous."""
        return not self.regular and self.path == "/dev/zero"

    @property
    def type_key(self) -> tuple[object, ...]:
        """Files of one driver: the file system, and for what is no regular file its path."""
        return (self.magic, self.mode & _S_IFMT, "" if self.regular else self.path)


def info_of(row: dict[str, Any]) -> FileInfo:
    """The FileInfo of a row of the table ``files``."""
    file, place, mode, magic, hooks = (int(row[name]) for name in ("file", "index", "mode", "fs_magic", "hooks"))
    return FileInfo(file, place, mode, magic, hooks, str(row["path"]))


def kind_of(info: FileInfo | None, anonymous: bool, close: bool) -> tuple[str, int]:
    """The kind of mapping for the rules, and bytes of one huge page; ``info``: None without a file."""
    if info is None:
        return ("", 0) if anonymous else ("special", 0)
    if info.private_zero:
        return "zero", 0
    if info.magic == TMPFS:
        if close:
            return "sysv", 0
        return ("shmem_anon" if info.shared_zero else "shmem"), 0
    if info.magic == HUGETLBFS:
        return "hugetlb", _DEFAULT_HUGE
    if info.magic == SECRETMEM:
        return "secretmem", 0
    if info.magic == AIO:
        return "aio", 0
    if info.bits & FILE_BITS["FILE_OWN_AREA"] and info.magic not in _ORDINARY:
        return "own_area", 0
    return "", 0


class HookSeen(NamedTuple):
    """What the decisions layer saw of a file's mmap_prepare: flags set and cleared, whether it left any vm_ops.

    ``nested``: it was called by the compatibility layer, for a stacked file.
    """

    set_flags: int
    clear_flags: int
    ops: bool
    nested: bool


@dataclass(frozen=True, slots=True)
class Learnt:
    """What mappings of a driver were seen to get from it."""

    set_flags: int
    clear_flags: int
    anonymous: bool
    close: bool


def _given(info: FileInfo) -> FileGiven:
    """A file as an input of mmap, without what its driver does."""
    bits = info.bits
    return FileGiven(
        info.identity,
        readable=bool(bits & FILE_BITS["FILE_READ"]),
        writable=bool(bits & FILE_BITS["FILE_WRITE"]),
        noexec=bool(bits & FILE_BITS["FILE_NOEXEC"]),
        write_sealed=bool(bits & FILE_BITS["FILE_SEALED"]),
        prepare=bool(bits & FILE_BITS["FILE_MMAP_PREPARE"]),
        kind=kind_of(info, False, False)[0],
        regular=info.regular,
    )


@dataclass(frozen=True, slots=True)
class Unlearnt:
    """A file whose driver is not known yet: ``plain`` is it without the driver."""

    plain: FileGiven
    reason: str


_NEVER: Final = Learnt(0, 0, False, False)


class Files:
    """The files of a trace as they come to be known, and the drivers learnt so far."""

    def __init__(self) -> None:
        self.known: dict[int, FileInfo] = {}
        #: How each file is described first: where it is used before its row is met.
        self.first: dict[int, FileInfo] = {}
        #: Bytes of each System V segment, by its id, from the attaches seen.
        self.segments: dict[int, int] = {}
        #: The same by the file that stands behind an attach.
        self.attached: dict[Hashable, int] = {}
        self.drivers: dict[tuple[object, ...], Learnt | None] = {}

    def info(self, identity: int) -> FileInfo | None:
        """A file as described last, or as it is described first later on."""
        return self.known.get(identity) or self.first.get(identity)

    def is_described(self, identity: Hashable) -> bool:
        """Whether the trace says what file this is; what the model made itself it knows."""
        return type(identity) is not int or self.info(identity) is not None

    def can_be_used(self, identity: int) -> bool:
        """Whether a descriptor of this file serves for more than its path (O_PATH), as far as is known."""
        info = self.info(identity)
        return info is None or bool(info.bits & (FILE_BITS["FILE_READ"] | FILE_BITS["FILE_WRITE"]))

    def may_refuse_splits(self, identity: Hashable) -> bool:
        """Whether a mapping of this file may have a vm_ops->may_split that no record tells of."""
        info = self.info(identity) if type(identity) is int else None
        return info is not None and not (info.regular or info.magic in _ORDINARY or info.private_zero)

    def described(self, identity: Hashable) -> int:
        """Where the description stands among all records."""
        info = self.info(identity) if type(identity) is int else None
        return -1 if info is None else info.place

    def given(
        self, identity: int, access: int, fd_given: bool, hook: HookSeen | None = None
    ) -> FileGiven | Unlearnt | str:
        """The input of an mmap that ended with file ``identity``; a text says why it is not known.

        ``access``: READ, WRITE, EXEC and SHARED as asked for. ``fd_given``: not an anonymous map. ``hook``: what its
        mmap_prepare was seen to do.
        """
        shared = access & SHARED
        info = self.info(identity)
        if info is None:
            return "the mapped file is not described in the trace"
        bits = info.bits
        given = _given(info)
        if not bits & (FILE_BITS["FILE_READ"] | FILE_BITS["FILE_WRITE"]):
            if shared:
                return "how the file was opened is not in the trace"
            given = replace(given, readable=True, writable=True)
        if bits & FILE_BITS["FILE_STACKED"]:
            # The kernel compares the file that was given, which no VMA holds, with the files that VMAs hold.
            given = replace(given, identity=("stacked", identity), kept=identity, prepare=False)
        if info.shared_zero and fd_given:
            # A shared map of /dev/zero ends with a shmem file of its own: what was given is not what is kept.
            zero = ("/dev/zero", identity)
            return replace(given, identity=zero, kept=identity, readable=True, writable=True)
        return self._driver(info, given, access, hook)

    def opened(self, identity: int) -> FileGiven | None:
        """What is known of a file that could not be mapped."""
        info = self.info(identity)
        if info is None or not info.bits & (FILE_BITS["FILE_READ"] | FILE_BITS["FILE_WRITE"]):
            return None
        can_map = bool(info.bits & (FILE_BITS["FILE_MMAP"] | FILE_BITS["FILE_MMAP_PREPARE"]))
        return replace(_given(info), can_map=can_map)

    def _driver(
        self, info: FileInfo, given: FileGiven, access: int, hook: HookSeen | None
    ) -> FileGiven | Unlearnt | str:
        if info.magic == SECRETMEM:
            return given  # what its hook sets is a rule of its own
        if info.magic == HUGETLBFS:
            return replace(given, set_flags=HUGETLB | DONTEXPAND, close=True, huge_size=_DEFAULT_HUGE)
        if info.ordinary:
            return given
        if info.private_zero and not access & SHARED:
            return replace(given, anonymous=True)
        if info.magic == OVERLAY:
            return "the file that was given to a stacked file system is not known"
        key = (*info.type_key, access)
        if hook is not None and (hook.set_flags | hook.clear_flags) & ~LEARNABLE:
            return "the hook of this file changes flags that are not a driver's"
        if hook is not None and not hook.ops:
            return replace(
                given,
                set_flags=hook.set_flags,
                clear_flags=hook.clear_flags,
                anonymous=True,
                nested_prepare=hook.nested,
            )
        if hook is None and self.drivers.get(key, _NEVER) is None:
            return "the driver of this file sets now this, now that"
        learnt = self.drivers.get(key)
        if learnt is not None and hook is not None:
            # Its flags were seen; whether its vm_ops have a close hook is what other mappings show.
            learnt = replace(learnt, set_flags=hook.set_flags, clear_flags=hook.clear_flags)
        if learnt is None:
            return Unlearnt(given, "what the driver of this file sets is not known yet")
        return replace(
            given,
            set_flags=learnt.set_flags,
            clear_flags=learnt.clear_flags,
            anonymous=learnt.anonymous,
            close=learnt.close,
        )

    def learn(self, vma: Vma, wanted: int) -> None:
        """Take from a mapping that was made anew what its driver does; ``wanted``: its flags without one."""
        info = self.info(vma.file) if isinstance(vma.file, int) else None
        if info is None or (vma.flags ^ wanted) & ~LEARNABLE:
            return
        key = (*info.type_key, access_of(wanted))
        self.drivers.setdefault(key, Learnt(vma.flags & ~wanted, wanted & ~vma.flags, vma.anonymous, vma.close))

    def doubt(self, identity: object, access: int) -> bool:
        """What was learnt of a file's driver does not hold: forget it for good. False: nothing was learnt."""
        info = self.info(identity) if isinstance(identity, int) else None
        if info is None or self.drivers.get((*info.type_key, access)) is None:
            return False
        self.drivers[*info.type_key, access] = None
        return True


def access_of(flags: int) -> int:
    """READ, WRITE, EXEC and whether it is shared (a map of a file opened for reading loses SHARED)."""
    return flags & ACCESS | (SHARED if flags & MAYSHARE else 0)
