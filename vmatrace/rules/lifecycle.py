"""Birth and death of an address space and its VMA objects: dup_mmap, exit_mmap, attach and detach, exec's
stack."""

from __future__ import annotations

from vmatrace.kernel import Commit
from vmatrace.rules.accounting import stat_account
from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import tree_is_out_of_memory
from vmatrace.rules.model import Copy, MmState, New, Operation, Unmap
from vmatrace.rules.registry import rule
from vmatrace.rules.steps import expand_vma, shrink_vma
from vmatrace.vma import (
    ACCOUNT,
    DONTCOPY,
    EXEC,
    GROWSDOWN,
    LOCKED_MASK,
    MAY_ALL,
    NOHUGEPAGE,
    RAND_READ,
    READ,
    SEQ_READ,
    SOFTDIRTY,
    UFFD_FLAGS,
    WIPEONFORK,
    WRITE,
    AddressSpace,
    Vma,
)  # fmt: skip


@rule("fork_skips_dontcopy", "dup_mmap")
def is_left_out(kernel: Kernel, vma: Vma) -> int:
    """A DONTCOPY VMA is left out of the child."""
    return vma.flags & DONTCOPY


@rule("fork_wipes", "dup_mmap")
def is_wiped(kernel: Kernel, vma: Vma) -> int:
    """A WIPEONFORK VMA is copied without its anon_vma."""
    return vma.flags & WIPEONFORK


@rule("fork_chains", "anon_vma_fork")
def gets_chained_anon_vma(kernel: Kernel, vma: Vma) -> bool:
    """The copy of a faulted VMA gets an anon_vma of its own behind the parent's: a chain of more than one
    for ever."""
    return vma.anon_vma is not None


@rule("fork_unlocks", "dup_mmap")
def lock_is_lost(kernel: Kernel, vma: Vma) -> int:
    """Locks are not inherited."""
    return vma.flags & LOCKED_MASK


@rule("fork_drops_uffd", "dup_userfaultfd")
def userfaultfd_is_lost(kernel: Kernel, vma: Vma) -> bool:
    """The child's VMAs lose userfaultfd context and flags unless it asked for fork events."""
    return vma.uffd is not None and not kernel.inputs.get("event_fork", False)


def copy_for_child(kernel: Kernel, vma: Vma) -> Vma:
    """vm_area_dup and what dup_mmap changes on the copy."""
    flags = vma.flags & ~(lock_is_lost(kernel, vma) or 0)
    anon_vma, forked, uffd = vma.anon_vma, vma.forked, vma.uffd
    if is_wiped(kernel, vma):
        anon_vma, forked = None, False
    elif gets_chained_anon_vma(kernel, vma):
        anon_vma, forked = kernel.space.fresh(), True
    if userfaultfd_is_lost(kernel, vma):
        flags, uffd = flags & ~UFFD_FLAGS, None
    return vma._replace(flags=flags, anon_vma=anon_vma, forked=forked, uffd=uffd, obj=kernel.space.fresh())


def fork(kernel: Kernel, operation: Operation) -> int:
    """dup_mmap: the child's space and mm come with the result; the parent does not change."""
    parent = kernel.mm
    child_mm = parent.copy()
    copies = []
    for vma in kernel.space:
        if is_left_out(kernel, vma):
            stat_account(child_mm, vma.flags, -((vma.end - vma.start) >> kernel.shift))
            continue
        copy = copy_for_child(kernel, vma)
        copies.append(copy)
        kernel.effects.append(Copy(copy.obj, vma.obj, copy.start, copy.end))
    child_mm.map_count = len(copies)
    child_mm.locked_vm = 0
    child_mm.def_flags &= ~(default_flags_are_lost(kernel, parent) or 0)
    kernel.child, kernel.child_mm = AddressSpace(copies), child_mm
    return 0


@rule("fork_default_flags", "mm_init (VM_INIT_DEF_MASK)")
def default_flags_are_lost(kernel: Kernel, parent: MmState) -> int:
    """Of the mm's default flags only NOHUGEPAGE is inherited: mlockall(MCL_FUTURE) is not."""
    return parent.def_flags & ~NOHUGEPAGE


def exit_mmap(kernel: Kernel, operation: Operation) -> int:
    """exit_mmap: every VMA goes."""
    gone = tuple(kernel.space)
    kernel.drop(gone)
    for vma in gone:
        kernel.effects.append(Unmap(vma.obj, vma.start, vma.end))
    kernel.mm.total_vm = kernel.mm.data_vm = kernel.mm.stack_vm = kernel.mm.exec_vm = kernel.mm.locked_vm = 0
    return 0


@rule(
    "exec_stack_setup",
    "create_init_stack_vma, __bprm_mm_init",
    commit=Commit("dd7a6246f4fd", "mm: abstract initial stack setup to mm subsystem", "v6.16"),
)
def first_stack_flags(kernel: Kernel) -> int:
    """exec's first stack page lies below STACK_TOP_MAX, with RAND_READ and SEQ_READ as marks of being
    unfinished."""
    dirty = SOFTDIRTY if kernel.limits.config.soft_dirty else 0
    executable = EXEC if kernel.limits.read_implies_exec else 0
    return READ | WRITE | MAY_ALL | GROWSDOWN | ACCOUNT | RAND_READ | SEQ_READ | dirty | executable


def create_init_stack(kernel: Kernel, operation: Operation) -> int:
    """create_init_stack_vma: one page below ``top``; fails with ENOMEM (insert, then KSM exit, unlock,
    free)."""
    top, page = operation.args["top"], kernel.limits.page_size
    start = top - page
    if not kernel.space.is_free(start, top) or tree_is_out_of_memory(kernel):
        kernel.fail("ENOMEM")
    pgoff = start >> kernel.shift
    vma = Vma(start, top, first_stack_flags(kernel) or 0, pgoff, obj=kernel.space.fresh())
    vma = kernel.add(vma._replace(anon_pgoff=pgoff) if kernel.has("anon_pgoff") else vma)
    kernel.mm.total_vm += 1
    kernel.mm.stack_vm += 1
    kernel.effects.append(New(vma.obj, start, top))
    return start


@rule(
    "exec_stack_moves",
    "relocate_vma_down, shift_arg_pages",
    commit=Commit("6c36ac1e124f", "mm: establish mm/vma_exec.c for shared exec/mm VMA functionality", "v6.16"),
)
def stack_keeps_offset(kernel: Kernel, vma: Vma) -> int:
    """exec's stack moves down by growing over both places and shrinking to the new one; its page offset
    stays."""
    return vma.pgoff


def relocate_stack(kernel: Kernel, operation: Operation) -> int:
    """relocate_vma_down: move the VMA at ``start`` down by ``shift`` bytes; EFAULT where another VMA is in
    the way."""
    vma = kernel.space.at(operation.args["start"])
    shift = operation.args["shift"]
    if vma is None or shift <= 0 or shift > vma.start:
        kernel.cannot_know("no VMA to move down")
    start, end = vma.start - shift, vma.end - shift
    if not kernel.space.is_free(start, vma.start):
        kernel.fail("EFAULT")
    pgoff = stack_keeps_offset(kernel, vma)
    if pgoff is None:
        pgoff = vma.pgoff - (shift >> kernel.shift)
    grown = expand_vma(kernel, vma, start, vma.end, pgoff)
    shrink_vma(kernel, grown, start, end, pgoff)
    return start


CALLS = {
    "fork": fork,
    "exit": exit_mmap,
    "create_init_stack": create_init_stack,
    "relocate_stack": relocate_stack,
}
