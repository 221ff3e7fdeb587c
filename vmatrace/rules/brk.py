"""brk: shrink is munmap of the tail, growth is do_brk_flags - the VMA below grows, or a new one is made."""

from __future__ import annotations

from vmatrace.rules.accounting import (
    charge_is_refused,
    lock_limit_is_reached,
    may_expand,
    new_map_is_one_too_many,
)
from vmatrace.rules.context import Kernel
from vmatrace.rules.ksm import process_opted_in
from vmatrace.rules.merge import merge_new_range
from vmatrace.rules.mmap_region import new_range_is_soft_dirty
from vmatrace.rules.model import NO_LIMIT, Grow, KernelError, New, Operation
from vmatrace.rules.munmap import check_seals_first, gather, remove
from vmatrace.rules.proposal import Proposal
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    ACCOUNT,
    EXEC,
    GROWSDOWN,
    LOCKED,
    MAY_ALL,
    MTE_ALLOWED,
    READ,
    SHADOW_STACK,
    WRITE,
    Vma,
)


@rule("brk_returns_old", "sys_brk")
def failure_shows_as_old_break(kernel: Kernel) -> bool:
    """brk never returns an errno: on failure it returns the break as it was."""
    return True


@rule("brk_data_limit", "check_data_rlimit")
def data_limit_is_reached(kernel: Kernel, brk: int) -> bool:
    """Heap and data segment together stay within RLIMIT_DATA."""
    mm, limit = kernel.mm, kernel.limits.rlimit_data
    return limit != NO_LIMIT and brk - mm.start_brk + mm.end_data - mm.start_data > limit


@rule("brk_guard_gap", "sys_brk")
def next_is_too_near(kernel: Kernel, old: int, new: int) -> bool:
    """Growth keeps one page from the next VMA, and the stack guard gap from one that grows down."""
    page = kernel.limits.page_size
    next = kernel.space.find(old)
    if next is None:
        return False
    gap = 0
    if next.flags & GROWSDOWN:
        gap = kernel.limits.stack_guard_gap * page
    elif next.flags & SHADOW_STACK:
        gap = page
    return new + page > max(next.start - gap, 0)


def _mte_of_data(kernel: Kernel) -> int:
    """VM_DATA_DEFAULT_FLAGS of arm64 has MTE_ALLOWED where the kernel knows it; so has the stack from exec."""
    if kernel.mm.data_flags is None:
        stack = next((vma for vma in kernel.space if vma.flags & GROWSDOWN), None)
        if stack is None:
            return 0
        kernel.mm.data_flags = stack.flags & MTE_ALLOWED
    return kernel.mm.data_flags


@rule("brk_heap_only", "sys_brk (vma_prev_limit)")
def below_is_not_the_heap(kernel: Kernel, prev: Vma) -> bool:
    """brk looks for the heap no lower than start_brk: what ends there (the program's bss) never grows."""
    return prev.end <= kernel.mm.start_brk


def _heap_below(kernel: Kernel, address: int) -> Vma | None:
    """The VMA that brk may grow."""
    prev = kernel.space.below(address)
    return None if prev is None or below_is_not_the_heap(kernel, prev) else prev


def grow_heap(kernel: Kernel, start: int, length: int) -> Vma:
    """do_brk_flags: the VMA that holds ``[start, start + length)``. Fails with ENOMEM."""
    flags = READ | WRITE | MAY_ALL | ACCOUNT | kernel.mm.def_flags
    flags |= EXEC if kernel.limits.read_implies_exec else 0
    flags |= _mte_of_data(kernel)
    early = kernel.has("early_ksm_flag")
    ksm = process_opted_in(kernel, flags, "") or 0
    if early:
        flags |= ksm
    pages = length >> kernel.shift
    if not may_expand(kernel, flags, pages) or new_map_is_one_too_many(kernel) or charge_is_refused(kernel):
        kernel.fail("ENOMEM")
    proposal = Proposal(start, start + length, start >> kernel.shift, flags, _heap_below(kernel, start))
    proposal.anon_pgoff = start >> kernel.shift if kernel.has("anon_pgoff") else None
    proposal.expand_only = True
    vma = merge_new_range(kernel, proposal, "brk")
    if vma is not None:
        kernel.effects.append(Grow(vma.obj, vma.start, vma.end))
    elif proposal.nomem:
        kernel.fail("ENOMEM")
    else:
        flags |= ksm
        vma = Vma(start, start + length, flags, start >> kernel.shift, obj=kernel.space.fresh())
        vma = kernel.add(vma._replace(anon_pgoff=proposal.anon_pgoff))
        kernel.effects.append(New(vma.obj, vma.start, vma.end))
    kernel.mm.total_vm += pages
    kernel.mm.data_vm += pages
    if flags & LOCKED:
        kernel.mm.locked_vm += pages
    dirty = vma.flags | (new_range_is_soft_dirty(kernel) or 0)
    return kernel.put(vma, vma.with_flags(dirty)) if dirty != vma.flags else vma


def brk(kernel: Kernel, operation: Operation) -> int:
    """brk(brk): the new break, or the old one where it cannot be."""
    mm, wanted = kernel.mm, operation.args["brk"]
    before = mm.brk
    try:
        _set_break(kernel, wanted)
    except KernelError:
        if not failure_shows_as_old_break(kernel):
            raise
        mm.brk = before
    return mm.brk


def _set_break(kernel: Kernel, wanted: int) -> None:
    mm = kernel.mm
    if wanted < mm.start_brk or data_limit_is_reached(kernel, wanted):
        kernel.fail("ENOMEM")
    new, old = kernel.align_up(wanted), kernel.align_up(mm.brk)
    if new == old:
        mm.brk = wanted
        return
    if wanted <= mm.brk:
        first = kernel.space.find(new)
        if first is None or first.start >= old:
            kernel.fail("ENOMEM")
        check_seals_first(kernel, new, old)
        remove(kernel, gather(kernel, new, old))
    else:
        if new > kernel.limits.task_size or lock_limit_is_reached(kernel, mm.def_flags, new - old):
            kernel.fail("ENOMEM")
        if next_is_too_near(kernel, old, new):
            kernel.fail("ENOMEM")
        grow_heap(kernel, old, new - old)
    mm.brk = wanted


CALLS = {"brk": brk}
