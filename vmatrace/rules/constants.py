"""Numbers of the system call interface by name (x86_64 and the generic ABI), and the parser of arguments."""

from __future__ import annotations

from typing import Final

from vmatrace.errors import UsageError, nearest

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_SEM: Final = 8
#: arm64 only.
PROT_BTI: Final = 0x10
PROT_GROWSDOWN: Final = 0x01000000
PROT_GROWSUP: Final = 0x02000000

MAP_SHARED: Final = 1
MAP_PRIVATE: Final = 2
MAP_SHARED_VALIDATE: Final = 3
MAP_DROPPABLE: Final = 8
MAP_TYPE: Final = 0xF
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_32BIT: Final = 0x40
#: x86 since v6.6.
MAP_ABOVE4G: Final = 0x80
MAP_GROWSDOWN: Final = 0x100
MAP_DENYWRITE: Final = 0x800
MAP_EXECUTABLE: Final = 0x1000
MAP_LOCKED: Final = 0x2000
MAP_NORESERVE: Final = 0x4000
MAP_POPULATE: Final = 0x8000
MAP_NONBLOCK: Final = 0x10000
MAP_STACK: Final = 0x20000
MAP_HUGETLB: Final = 0x40000
MAP_SYNC: Final = 0x80000
MAP_FIXED_NOREPLACE: Final = 0x100000

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4

MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
MLOCK_ONFAULT: Final = 1

SHM_RDONLY: Final = 0o10000
SHM_RND: Final = 0o20000
SHM_REMAP: Final = 0o40000
SHM_EXEC: Final = 0o100000

MADV: Final[dict[str, int]] = {
    "MADV_NORMAL": 0, "MADV_RANDOM": 1, "MADV_SEQUENTIAL": 2, "MADV_WILLNEED": 3, "MADV_DONTNEED": 4,
    "MADV_FREE": 8,
    "MADV_REMOVE": 9, "MADV_DONTFORK": 10, "MADV_DOFORK": 11, "MADV_MERGEABLE": 12, "MADV_UNMERGEABLE": 13,
    "MADV_HUGEPAGE": 14, "MADV_NOHUGEPAGE": 15, "MADV_DONTDUMP": 16, "MADV_DODUMP": 17, "MADV_WIPEONFORK": 18,
    "MADV_KEEPONFORK": 19, "MADV_COLD": 20, "MADV_PAGEOUT": 21, "MADV_POPULATE_READ": 22,
    "MADV_POPULATE_WRITE": 23,
    "MADV_DONTNEED_LOCKED": 24, "MADV_COLLAPSE": 25, "MADV_HWPOISON": 100, "MADV_SOFT_OFFLINE": 101,
    "MADV_GUARD_INSTALL": 102, "MADV_GUARD_REMOVE": 103,
}  # fmt: skip

MPOL: Final[dict[str, int]] = {
    "MPOL_DEFAULT": 0, "MPOL_PREFERRED": 1, "MPOL_BIND": 2, "MPOL_INTERLEAVE": 3, "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5, "MPOL_WEIGHTED_INTERLEAVE": 6,
}  # fmt: skip

UFFDIO_REGISTER_MODE_MISSING: Final = 1
UFFDIO_REGISTER_MODE_WP: Final = 2
UFFDIO_REGISTER_MODE_MINOR: Final = 4

_PREFIXES: Final = ("PROT_", "MAP_", "MREMAP_", "MCL_", "MLOCK_", "SHM_", "UFFDIO_")

#: Every constant by name.
CONSTANTS: Final[dict[str, int]] = {
    **{name: value for name, value in globals().items() if name.startswith(_PREFIXES)},
    **MADV,
    **MPOL,
    "PROT_NONE": 0,
    "MAP_ANON": MAP_ANONYMOUS,
}


def parse_constant(key: str, value: object) -> int:
    """An argument: a number, ``"PROT_READ|PROT_WRITE"``, or a list of names. Raises UsageError."""
    if isinstance(value, bool) or value is None:
        return int(bool(value))
    if isinstance(value, int):
        return value
    words = value.replace("|", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list):
        raise UsageError(f"{key} {value!r} is no number")
    bits = 0
    for word in words:
        if not isinstance(word, str) or word not in CONSTANTS:
            near = nearest(str(word), CONSTANTS)
            raise UsageError(f"{key}: unknown constant {word!r}", f"did you mean {near}?" if near else "")
        bits |= CONSTANTS[word]
    return bits
