"""mlock, mlock2, munlock, mlockall, munlockall: apply_vma_lock_flags walks, mlock_fixup changes one VMA."""

from __future__ import annotations

from vmatrace.rules.constants import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, MLOCK_ONFAULT
from vmatrace.rules.context import Kernel
from vmatrace.rules.model import KernelError, Operation
from vmatrace.rules.modify import modify_flags
from vmatrace.rules.mprotect import nothing_changes
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    ACCESS,
    DROPPABLE,
    HUGETLB,
    IO,
    LOCKED,
    LOCKED_MASK,
    LOCKONFAULT,
    MAYBE_GUARD,
    PFNMAP,
    PKEY_MASK,
    SPECIAL,
    UFFD_FLAGS,
    Vma,
)  # fmt: skip


@rule("unlockable_skipped", "mlock_fixup")
def cannot_be_locked(kernel: Kernel, vma: Vma) -> bool:
    """Special, hugetlb, dax and secret mappings and the gate are skipped by mlock and munlock."""
    return bool(vma.flags & (SPECIAL | HUGETLB)) or vma.kind in ("dax", "gate", "secretmem")


@rule("droppable_not_locked", "mlock_fixup", feature="droppable")
def droppable_is_skipped(kernel: Kernel, vma: Vma) -> int:
    """Droppable mappings are skipped by mlock and munlock."""
    return vma.flags & DROPPABLE


@rule("memlock_total", "do_mlock")
def too_much_is_locked(kernel: Kernel, start: int, length: int) -> bool:
    """Without CAP_IPC_LOCK all locked pages together stay within RLIMIT_MEMLOCK; what is locked already is
    free."""
    if kernel.limits.can_lock:
        return False
    limit = kernel.limits.rlimit_memlock >> kernel.shift
    wanted = kernel.mm.locked_vm + (length >> kernel.shift)
    if wanted > limit:
        end = start + length
        locked = (vma for vma in kernel.space.overlapping(start, end) if vma.flags & LOCKED)
        wanted -= sum(min(vma.end, end) - max(vma.start, start) for vma in locked) >> kernel.shift
    return wanted > limit


@rule("mlock_not_accessible", "__mm_populate, __mlock_posix_error_return")
def pages_cannot_be_touched(kernel: Kernel, start: int, end: int) -> bool:
    """mlock of memory that cannot be populated (no access rights, secret) does its work, then fails with
    ENOMEM."""
    for vma in kernel.space.overlapping(start, end):
        secret = vma.kind == "secretmem"
        if (secret or not vma.flags & ACCESS) and not vma.flags & (IO | PFNMAP | LOCKONFAULT):
            return True
    return False


def fixup(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int, flags: int) -> Vma:
    """mlock_fixup: the VMA that holds the range afterwards."""
    old = vma.flags
    if nothing_changes(kernel, old, flags) or cannot_be_locked(kernel, vma) or droppable_is_skipped(kernel, vma):
        return vma
    changed = modify_flags(kernel, vma, prev, start, end, flags)
    pages = (end - start) >> kernel.shift
    if not flags & LOCKED:
        kernel.mm.locked_vm -= pages
    elif not old & LOCKED:
        kernel.mm.locked_vm += pages
    return changed


def _apply(kernel: Kernel, start: int, length: int, bits: int) -> None:
    """apply_vma_lock_flags: stops at the first gap or failure, earlier VMAs stay changed."""
    end = start + length
    if end >= 1 << 64:
        kernel.fail("EINVAL")
    if end == start:
        return
    prev = kernel.space.below(start)
    while start < end:
        vma = kernel.space.at(start)
        if vma is None:
            kernel.fail("ENOMEM")
        prev = fixup(kernel, vma, prev, start, min(vma.end, end), vma.flags & ~LOCKED_MASK | bits)
        start = prev.end


def _round(kernel: Kernel, start: int, length: int) -> tuple[int, int]:
    """Start down and length up to pages, as mlock and munlock do."""
    offset = start & (kernel.limits.page_size - 1)
    return start - offset, kernel.align_up(length + offset) & ((1 << 64) - 1)


def _lock(kernel: Kernel, start: int, length: int, bits: int) -> int:
    if not kernel.limits.can_lock and kernel.limits.rlimit_memlock == 0:
        kernel.fail("EPERM")
    start, length = _round(kernel, start, length)
    if too_much_is_locked(kernel, start, length):
        kernel.fail("ENOMEM")
    _apply(kernel, start, length, bits)
    kernel.maybe_errnos.add("EINTR")  # populating stops where a fatal signal waits
    if pages_cannot_be_touched(kernel, start, start + length):
        kernel.fail("ENOMEM")
    _note_unsure_populate(kernel, start, start + length)
    return 0


def _note_unsure_populate(kernel: Kernel, start: int, end: int) -> None:
    """Populating may fail on guard regions, under a userfaultfd, past the end of a file and where the task's
    protection keys forbid it (as an execute-only mapping's does): no rule knows the pages or PKRU."""
    # Before guard regions had a flag, any VMA that has an anon_vma may hide some.
    hidden = kernel.has("guard_regions") and not kernel.has("sticky_flags")
    for vma in kernel.space.overlapping(start, end):
        unsure = vma.flags & (MAYBE_GUARD | UFFD_FLAGS | PKEY_MASK) or (hidden and vma.anon_vma is not None)
        if unsure or vma.file is not None:
            kernel.maybe_errnos.update(("ENOMEM", "EAGAIN"))


def mlock(kernel: Kernel, operation: Operation) -> int:
    """mlock(start, len)."""
    return _lock(kernel, operation.args["start"], operation.args["len"], LOCKED)


def mlock2(kernel: Kernel, operation: Operation) -> int:
    """mlock2(start, len, flags)."""
    flags = operation.args.get("flags", 0)
    if flags & ~MLOCK_ONFAULT:
        kernel.fail("EINVAL")
    return _lock(kernel, operation.args["start"], operation.args["len"], LOCKED_MASK if flags else LOCKED)


def munlock(kernel: Kernel, operation: Operation) -> int:
    """munlock(start, len)."""
    start, length = _round(kernel, operation.args["start"], operation.args["len"])
    _apply(kernel, start, length, 0)
    return 0


@rule("mlockall_limit", "sys_mlockall")
def whole_mm_is_too_much(kernel: Kernel, flags: int) -> bool:
    """mlockall(MCL_CURRENT) needs total_vm within RLIMIT_MEMLOCK, or CAP_IPC_LOCK."""
    limit = kernel.limits.rlimit_memlock >> kernel.shift
    return bool(flags & MCL_CURRENT) and not kernel.limits.can_lock and kernel.mm.total_vm > limit


@rule("mlockall_ignores_errors", "apply_mlockall_flags", unobservable=True)
def failures_are_ignored(kernel: Kernel) -> bool:
    """mlockall goes on when one VMA cannot be changed."""
    return True


def _apply_all(kernel: Kernel, flags: int) -> None:
    """apply_mlockall_flags: default flags of the mm, then every VMA."""
    bits = LOCKED_MASK if flags & MCL_ONFAULT else LOCKED
    kernel.mm.def_flags &= ~LOCKED_MASK
    if flags & MCL_FUTURE:
        kernel.mm.def_flags |= bits
        if not flags & MCL_CURRENT:
            return
    to_add = bits if flags & MCL_CURRENT else 0
    prev: Vma | None = None
    vma = kernel.space.find(0)
    while vma is not None:
        try:
            prev = fixup(kernel, vma, prev, vma.start, vma.end, vma.flags & ~LOCKED_MASK | to_add)
        except KernelError:
            if not failures_are_ignored(kernel):
                raise
            prev = vma
        vma = kernel.space.find(prev.end)


def mlockall(kernel: Kernel, operation: Operation) -> int:
    """mlockall(flags)."""
    flags = operation.args["flags"]
    if not flags or flags & ~(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) or flags == MCL_ONFAULT:
        kernel.fail("EINVAL")
    if not kernel.limits.can_lock and kernel.limits.rlimit_memlock == 0:
        kernel.fail("EPERM")
    if whole_mm_is_too_much(kernel, flags):
        kernel.fail("ENOMEM")
    _apply_all(kernel, flags)
    return 0


def munlockall(kernel: Kernel, operation: Operation) -> int:
    """munlockall()."""
    _apply_all(kernel, 0)
    return 0


CALLS = {"mlock": mlock, "mlock2": mlock2, "munlock": munlock, "mlockall": mlockall, "munlockall": munlockall}
