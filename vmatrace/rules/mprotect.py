"""mprotect and pkey_mprotect: do_mprotect_pkey walks the range, mprotect_fixup changes one VMA."""

from __future__ import annotations

from vmatrace.rules.accounting import charge_is_refused, may_expand, stat_account
from vmatrace.rules.anon_vma import populate_writes, prepare_anon_vma
from vmatrace.rules.constants import PROT_BTI, PROT_EXEC, PROT_GROWSDOWN, PROT_GROWSUP, PROT_READ, PROT_SEM, PROT_WRITE
from vmatrace.rules.context import Kernel
from vmatrace.rules.mmap import branch_targets_are_guarded, prot_flags, read_implies_exec, write_exec_is_denied
from vmatrace.rules.model import Operation
from vmatrace.rules.modify import modify_flags
from vmatrace.rules.munmap import check_seals_first, is_sealed
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    ACCESS,
    ACCOUNT,
    ARCH_1,
    GROWSDOWN,
    HUGETLB,
    LOCKED,
    LOCKONFAULT,
    MAYEXEC,
    NORESERVE,
    PKEY_MASK,
    PKEY_SHIFT,
    SHARED,
    WRITE,
    Vma,
)  # fmt: skip


@rule("prot_within_may", "do_mprotect_pkey")
def access_is_not_allowed(kernel: Kernel, flags: int) -> int:
    """READ, WRITE and EXEC each need their MAY bit."""
    return flags & ~(flags >> 4) & ACCESS


@rule("write_gains_account", "mprotect_fixup")
def becomes_charged(kernel: Kernel, old: int, new: int) -> int:
    """A private mapping that becomes writable for the first time is charged and gets ACCOUNT."""
    return ACCOUNT if new & WRITE and not old & (ACCOUNT | WRITE | HUGETLB | SHARED | NORESERVE) else 0


@rule("readonly_drops_account", "mprotect_fixup", feature="mprotect_drops_account")
def stops_being_charged(kernel: Kernel, vma: Vma, new: int) -> int:
    """An anonymous VMA that was never faulted gives ACCOUNT back when it becomes read-only."""
    return ACCOUNT & vma.flags if not new & WRITE and vma.anonymous and vma.anon_vma is None else 0


@rule("same_flags_no_merge", "mprotect_fixup, mlock_fixup, madvise_update_vma")
def nothing_changes(kernel: Kernel, old: int, new: int) -> bool:
    """A VMA whose flags stay the same is left alone: no merge is tried."""
    return old == new


@rule("pkey_kept", "arch_override_mprotect_pkey")
def key_is_kept(kernel: Kernel, vma: Vma, prot: int) -> int:
    """mprotect keeps a VMA's protection key; becoming execute-only takes the mm's own key, and leaving that
    state gives it back."""
    if not kernel.limits.config.pkeys:
        return 0
    own, execute_only = (vma.flags & PKEY_MASK) >> PKEY_SHIFT, kernel.inputs.get("execute_pkey") or 0
    if prot == PROT_EXEC:
        return execute_only or own
    return 0 if vma.flags & ACCESS == PROT_EXEC and own == execute_only else own


@rule("locked_cow_populates", "mprotect_fixup (populate_vma_page_range)")
def locked_pages_are_copied(kernel: Kernel, old: int, new: int) -> bool:
    """A locked private VMA that becomes writable is populated at once, which gives it an anon_vma."""
    return old & (WRITE | SHARED | LOCKED) == LOCKED and bool(new & WRITE) and not new & LOCKONFAULT


def fixup(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int, flags: int) -> Vma:
    """mprotect_fixup: the VMA that holds the range afterwards."""
    old = vma.flags
    if is_sealed(kernel, vma):
        kernel.fail("EPERM")
    if nothing_changes(kernel, old, flags):
        return vma
    pages = (end - start) >> kernel.shift
    if flags & WRITE and not may_expand(kernel, flags, pages) and may_expand(kernel, old, pages):
        kernel.fail("ENOMEM")
    charged = becomes_charged(kernel, old, flags)
    if charged:
        if charge_is_refused(kernel):
            kernel.fail("ENOMEM")
        flags |= charged
    flags &= ~(stops_being_charged(kernel, vma, flags) or 0)
    changed = modify_flags(kernel, vma, prev, start, end, flags)
    stat_account(kernel.mm, old, -pages)
    stat_account(kernel.mm, flags, pages)
    if locked_pages_are_copied(kernel, old, flags) and populate_writes(kernel, changed):
        return prepare_anon_vma(kernel, changed)
    return changed


def protect(kernel: Kernel, start: int, length: int, prot: int, pkey: int) -> int:
    """do_mprotect_pkey: earlier VMAs stay changed where a later one, or a gap, fails the call."""
    grows, prot = prot & (PROT_GROWSDOWN | PROT_GROWSUP), prot & ~(PROT_GROWSDOWN | PROT_GROWSUP)
    if grows == PROT_GROWSDOWN | PROT_GROWSUP or not kernel.aligned(start):
        kernel.fail("EINVAL")
    if length == 0:
        return 0
    end = start + kernel.align_up(length)
    if end >= 1 << 64:
        kernel.fail("ENOMEM")
    guarded = branch_targets_are_guarded(kernel, prot) or 0
    if prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC | PROT_SEM | (PROT_BTI if guarded else 0)):
        kernel.fail("EINVAL")
    if pkey != -1 and not kernel.mm.pkeys >> pkey & 1:
        kernel.fail("EINVAL")
    start = _start_of(kernel, start, end, grows)
    check_seals_first(kernel, start, end)
    prev = kernel.space.below(start)
    while start < end:
        vma = kernel.space.at(start)
        if vma is None:
            kernel.fail("ENOMEM")
        wanted = prot | (read_implies_exec(kernel, prot, bool(vma.flags & MAYEXEC)) or 0)
        flags = _new_flags(kernel, vma, wanted, pkey) | guarded
        prev = fixup(kernel, vma, prev, start, min(vma.end, end), flags)
        start = prev.end
    return 0


def _start_of(kernel: Kernel, start: int, end: int, grows: int) -> int:
    first = kernel.space.find(start)
    if first is None or first.start >= end or (not grows & PROT_GROWSDOWN and first.start > start):
        kernel.fail("ENOMEM")
    if grows & PROT_GROWSUP or (grows and not first.flags & GROWSDOWN):
        kernel.fail("EINVAL")
    return first.start if grows else start


def _new_flags(kernel: Kernel, vma: Vma, prot: int, pkey: int) -> int:
    key = pkey if pkey != -1 else key_is_kept(kernel, vma, prot) or 0
    kept = ~(ACCESS | PKEY_MASK) if kernel.limits.config.bti is False else ~(ACCESS | PKEY_MASK | ARCH_1)
    flags = prot_flags(kernel, prot & 7, key) | vma.flags & kept
    if access_is_not_allowed(kernel, flags) or write_exec_is_denied(kernel, vma.flags, flags):
        kernel.fail("EACCES")
    return flags


def mprotect(kernel: Kernel, operation: Operation) -> int:
    """mprotect(start, len, prot)."""
    args = operation.args
    return protect(kernel, args["start"], args["len"], args["prot"], -1)


def pkey_mprotect(kernel: Kernel, operation: Operation) -> int:
    """pkey_mprotect(start, len, prot, pkey)."""
    args = operation.args
    pkey = args.get("pkey", -1)
    return protect(kernel, args["start"], args["len"], args["prot"], -1 if pkey == 0xFFFFFFFF else pkey)


CALLS = {"mprotect": mprotect, "pkey_mprotect": pkey_mprotect}
