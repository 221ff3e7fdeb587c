"""Programs of the fingerprint on memory of special kinds: sealed, droppable, secret, watched by a userfaultfd."""

from __future__ import annotations

import ctypes
import errno
import os

from vmatrace.fingerprint.arena import (
    DONTFORK,
    DROPPABLE,
    LIBC,
    MCL_FUTURE,
    PAGE,
    PRIVATE,
    READ,
    SHARED,
    SYS_MEMFD_SECRET,
    SYS_MSEAL,
    SYS_USERFAULTFD,
    UFFD_API,
    UFFD_MISSING,
    UFFD_USER_MODE_ONLY,
    UFFD_WP,
    UFFDIO_API,
    UFFDIO_REGISTER,
    Answer,
    Arena,
    Unable,
    checked,
)


def mseal(arena: Arena) -> Answer:
    """Whether the call is there."""
    arena.map(0, 1)
    if _seal(arena, 0, 1) == 0:
        return True, "mseal works"
    number = ctypes.get_errno()
    return (False if number == errno.ENOSYS else None), f"mseal: {errno.errorcode.get(number, number)}"


def mseal_per_vma(arena: Arena) -> Answer:
    """A call that meets a sealed VMA keeps its earlier effects."""
    arena.map(0, 2)
    if _seal(arena, 1, 1) != 0:
        return False, "no mseal"
    LIBC.mprotect(arena.at(0), 2 * PAGE, READ)
    changed = "wr" not in arena.areas(0, 1)[0].flags
    return (
        changed,
        f"mprotect up to a sealed page: what lies before it {'changed' if changed else 'did not change'}",
    )


def seal_discard_by_ops(arena: Arena) -> Answer:
    """A private map of /dev/zero is anonymous by its operations, and has a file."""
    fd = os.open("/dev/zero", os.O_RDONLY)
    arena.map(0, 1, PRIVATE, fd, prot=READ)
    if _seal(arena, 0, 1) != 0:
        return False, "no mseal"
    refused = LIBC.madvise(arena.at(0), PAGE, DONTFORK) != 0
    return refused, f"MADV_DONTFORK of a sealed private /dev/zero {'is refused' if refused else 'works'}"


def seal_bit_low(arena: Arena) -> Answer:
    """Nothing shows the bit from outside: the commit after the one that moved it tells."""
    value, text = seal_discard_by_ops(arena)
    return value, f"{text} (marks the same series)"


def _seal(arena: Arena, page: int, count: int) -> int:
    args = (ctypes.c_long(SYS_MSEAL), ctypes.c_void_p(arena.at(page)), ctypes.c_size_t(count * PAGE))
    return int(LIBC.syscall(*args, ctypes.c_long(0)))


def droppable(arena: Arena) -> Answer:
    """Whether MAP_DROPPABLE is granted."""
    if not _map_droppable(arena):
        return False, "MAP_DROPPABLE is refused"
    return True, "MAP_DROPPABLE works"


def droppable_unlockable(arena: Arena) -> Answer:
    """What becomes of the lock bit that MCL_FUTURE gives."""
    checked(LIBC.mlockall(MCL_FUTURE), "mlockall")
    if not _map_droppable(arena):
        return False, "MAP_DROPPABLE is refused"
    locked = "lo" in arena.areas()[0].flags
    return not locked, f"MAP_DROPPABLE after mlockall(MCL_FUTURE): lo {'set' if locked else 'not set'}"


def _map_droppable(arena: Arena) -> bool:
    try:
        arena.map(0, 2, DROPPABLE)
    except Unable:
        return False
    return "dp" in arena.areas()[0].flags


def secretmem_unlocked(arena: Arena) -> Answer:
    """Secret memory once carried the lock bit."""
    fd = int(LIBC.syscall(ctypes.c_long(SYS_MEMFD_SECRET), ctypes.c_long(0)))
    checked(fd, "memfd_secret")
    os.ftruncate(fd, 2 * PAGE)
    arena.map(0, 2, SHARED, fd)
    locked = "lo" in arena.areas()[0].flags
    return not locked, f"memfd_secret mapping: lo {'set' if locked else 'not set'}"


def uffd_not_droppable(arena: Arena) -> Answer:
    """Whether droppable memory can be watched."""
    if not _map_droppable(arena):
        return False, "MAP_DROPPABLE is refused"
    refused = not _register(_userfaultfd(), arena, UFFD_MISSING)
    return refused, f"userfaultfd of MAP_DROPPABLE {'is refused' if refused else 'works'}"


def uffd_modes_kept(arena: Arena) -> Answer:
    """Write-protect tracking is the mode that is kept."""
    arena.map(0, 2)
    watcher = _userfaultfd()
    if not _register(watcher, arena, UFFD_MISSING | UFFD_WP):
        return False, "userfaultfd has no write-protect mode"
    refused = not _register(watcher, arena, UFFD_MISSING)
    return refused, f"userfaultfd without the write-protect mode of before {'is refused' if refused else 'works'}"


def _userfaultfd() -> int:
    flags = ctypes.c_long(os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    fd = checked(int(LIBC.syscall(ctypes.c_long(SYS_USERFAULTFD), flags)), "userfaultfd")
    greeting = (ctypes.c_uint64 * 3)(UFFD_API)
    checked(LIBC.ioctl(fd, UFFDIO_API, greeting), "UFFDIO_API")
    return fd


def _register(fd: int, arena: Arena, mode: int) -> bool:
    """Whether the arena's first two pages can be registered."""
    request = (ctypes.c_uint64 * 4)(arena.at(0), 2 * PAGE, mode)
    return bool(LIBC.ioctl(fd, UFFDIO_REGISTER, request) == 0)
