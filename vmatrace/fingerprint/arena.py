"""A private stretch of addresses, and the calls that change mappings there, for the fingerprint's programs.

Imports nothing but the standard library: it runs in a bare interpreter that forks.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import NamedTuple

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
_ADDRESS, _SIZE, _INT, _LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_long
for _name, _result, _arguments in (
    ("mmap", _ADDRESS, (_ADDRESS, _SIZE, _INT, _INT, _INT, _LONG)),
    ("munmap", _INT, (_ADDRESS, _SIZE)),
    ("mprotect", _INT, (_ADDRESS, _SIZE, _INT)),
    ("madvise", _INT, (_ADDRESS, _SIZE, _INT)),
    ("mremap", _ADDRESS, (_ADDRESS, _SIZE, _SIZE, _INT, _ADDRESS)),
    ("shmget", _INT, (_INT, _SIZE, _INT)),
    ("shmat", _ADDRESS, (_INT, _ADDRESS, _INT)),
    ("prctl", _INT, (_INT, _LONG, _LONG, _LONG, _LONG)),
    ("ioctl", _INT, (_INT, _LONG, _ADDRESS)),
):
    _function = getattr(LIBC, _name)
    _function.restype, _function.argtypes = _result, _arguments
LIBC.syscall.restype = _LONG

READ, WRITE, RW = 1, 2, 3
SHARED, PRIVATE, DROPPABLE, FIXED, ANON = 0x01, 0x02, 0x08, 0x10, 0x20
LOCKED, STACK = 0x2000, 0x20000
MAYMOVE, MREMAP_FIXED, DONTUNMAP = 1, 2, 4
MCL_FUTURE = 2
DONTFORK, DONTDUMP, DODUMP, GUARD_INSTALL = 10, 16, 17, 102
PR_SET_MEMORY_MERGE, PR_SET_VMA = 67, 0x53564D41
# These numbers are the same on every architecture that numbers its calls in the common table.
SYS_MEMFD_SECRET, SYS_MSEAL = 447, 462
# userfaultfd is older: x86 has a number of its own for it.
SYS_USERFAULTFD = 323 if os.uname().machine == "x86_64" else 282
UFFD_API, UFFD_USER_MODE_ONLY = 0xAA, 1
UFFD_MISSING, UFFD_WP = 1, 2
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
ROOM = 64


Answer = tuple["bool | None", str]


class Unable(Exception):
    """The program cannot tell here; its text says why."""


class Area(NamedTuple):
    """What smaps says of one mapping: its pages, counted from the arena's first, and its flags."""

    start: int
    end: int
    flags: frozenset[str]


class Arena:
    """A stretch of free addresses, used by page number; each program has one of its own."""

    def __init__(self) -> None:
        found = LIBC.mmap(None, (ROOM + 2) * PAGE, 0, PRIVATE | ANON, -1, 0)
        self.base = checked(found, "mmap") + PAGE
        # The first and the last page stay mapped: nothing outside can touch what happens inside.
        LIBC.munmap(self.base, ROOM * PAGE)

    def at(self, page: int) -> int:
        """The address of a page."""
        return self.base + page * PAGE

    def map(self, page: int, count: int, flags: int = 0, fd: int = -1, prot: int = RW, at: int = 0) -> None:
        """mmap at a fixed place, private and anonymous unless a file is given (its page ``at`` first)."""
        if fd < 0 and not flags & DROPPABLE:
            flags |= PRIVATE
        flags |= FIXED | (ANON if fd < 0 else 0)
        checked(LIBC.mmap(self.at(page), count * PAGE, prot, flags, fd, at * PAGE), "mmap")

    def touch(self, page: int, count: int = 1) -> None:
        """Writes to pages, so that the VMA gains its anon_vma."""
        for index in range(page, page + count):
            ctypes.c_char.from_address(self.at(index)).value = b"x"

    def advise(self, page: int, count: int, advice: int) -> None:
        """madvise, which must work."""
        checked(LIBC.madvise(self.at(page), count * PAGE, advice), "madvise")

    def protect(self, page: int, count: int, prot: int) -> None:
        """mprotect, which must work."""
        checked(LIBC.mprotect(self.at(page), count * PAGE, prot), "mprotect")

    def move(self, page: int, count: int, to: int, flags: int = 0) -> None:
        """mremap to a fixed place, which must work."""
        size = count * PAGE
        flags |= MAYMOVE | MREMAP_FIXED
        checked(LIBC.mremap(self.at(page), size, size, flags, self.at(to)), "mremap")

    def areas(self, page: int = 0, count: int = ROOM) -> list[Area]:
        """The mappings that lie in these pages, as smaps shows them."""
        low, high = self.at(page), self.at(page + count)
        found: list[Area] = []
        bounds = (0, 0)
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
            for line in smaps:
                first, *rest = line.split()
                if "-" in first and not first.endswith(":"):
                    bounds = tuple(int(part, 16) for part in first.split("-"))  # type: ignore[assignment]
                elif first == "VmFlags:" and bounds[0] < high and bounds[1] > low:
                    start, end = ((bound - self.base) // PAGE for bound in bounds)
                    found.append(Area(start, end, frozenset(rest)))
        return found

    def sizes(self, page: int = 0, count: int = ROOM) -> list[int]:
        """The lengths of the mappings in these pages, in pages."""
        return [area.end - area.start for area in self.areas(page, count)]


def checked(result: int | None, call: str) -> int:
    """The result of a call; raises `Unable` with the errno where it failed."""
    if result is None or result == ctypes.c_void_p(-1).value or result == -1:
        number = ctypes.get_errno()
        raise Unable(f"{call}: {errno.errorcode.get(number, number)}")
    return result
