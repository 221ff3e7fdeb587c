"""The inner half of mmap: __mmap_region - gather what is there, test limits, merge or make a new VMA."""

from __future__ import annotations

from vmatrace.rules.accounting import (
    account,
    charge_is_refused,
    may_expand,
    stat_account,
)
from vmatrace.rules.context import Kernel
from vmatrace.rules.hooks import Mapping, hook_runs_before_merge, merged_vma_takes_the_hooks_ops, run_hook
from vmatrace.rules.ksm import ksm_flag
from vmatrace.rules.merge import merge_new_range, tree_is_out_of_memory
from vmatrace.rules.model import FileGiven, KernelError, New, Unmap
from vmatrace.rules.munmap import Gathered, check_seals_first, gather, remove
from vmatrace.rules.proposal import Proposal
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    ACCOUNT,
    DROPPABLE,
    HUGETLB,
    LOCKED,
    LOCKED_MASK,
    NORESERVE,
    SHARED,
    SOFTDIRTY,
    SPECIAL,
    WRITE,
    Vma,
)  # fmt: skip


@rule("account_charged", "accountable_mapping")
def mapping_is_charged(kernel: Kernel, mapping: Mapping) -> bool:
    """A private writable mapping without NORESERVE is charged and gets ACCOUNT; hugetlb never."""
    return not mapping.huge_size and mapping.flags & (NORESERVE | SHARED | WRITE) == WRITE


@rule("overlay_unmapped_first", "mmap_region", until="vmg")
def old_mapping_goes_first(kernel: Kernel) -> bool:
    """What a fixed mapping covers is unmapped for real before anything is tested."""
    return True


@rule("softdirty_on_new", "__mmap_complete, do_brk_flags")
def new_range_is_soft_dirty(kernel: Kernel) -> int:
    """A new or grown VMA gets SOFTDIRTY after the merge, where the kernel is configured for it."""
    return SOFTDIRTY if kernel.limits.config.soft_dirty else 0


@rule("unlockable_loses_locked", "__mmap_complete")
def mapping_cannot_be_locked(kernel: Kernel, vma: Vma) -> bool:
    """LOCKED goes from special, hugetlb and dax mappings again, after the merge test."""
    return bool(vma.flags & (SPECIAL | HUGETLB)) or vma.kind in ("dax", "gate")


@rule("droppable_loses_locked", "vma_supports_mlock", feature="droppable_unlockable")
def droppable_cannot_be_locked(kernel: Kernel, vma: Vma) -> int:
    """LOCKED goes from droppable mappings too."""
    return vma.flags & DROPPABLE


@rule("failed_hook_leaves_hole", "vms_abort_munmap_vmas")
def old_mapping_is_lost(kernel: Kernel, gathered: Gathered) -> bool:
    """A hook that fails under MAP_FIXED leaves a hole: the old mapping's page tables are gone by then."""
    return bool(gathered.vmas)


def map_region(kernel: Kernel, mapping: Mapping) -> Vma:
    """__mmap_region: the VMA that holds the mapping afterwards (merged or new). Fails with its step's
    errno."""
    if old_mapping_goes_first(kernel):
        if not may_expand(kernel, mapping.flags, _net_pages(kernel, mapping)):
            kernel.fail("ENOMEM")
        check_seals_first(kernel, mapping.start, mapping.end)
        gathered = gather(kernel, mapping.start, mapping.end)
        remove(kernel, gathered)
    else:
        check_seals_first(kernel, mapping.start, mapping.end)
        gathered = gather(kernel, mapping.start, mapping.end)
        pages = (mapping.end - mapping.start - gathered.length) >> kernel.shift
        if not may_expand(kernel, mapping.flags, pages):
            kernel.fail("ENOMEM")
    if mapping_is_charged(kernel, mapping):
        if charge_is_refused(kernel):
            kernel.fail("ENOMEM")
        mapping.flags |= ACCOUNT
    # From here on the old page tables are gone (vms_clean_up_area), so nothing that is removed comes back.
    if not old_mapping_goes_first(kernel):
        remove(kernel, gathered)
    try:
        vma = _merge_or_make(kernel, mapping)
    except KernelError:
        if not old_mapping_is_lost(kernel, gathered):
            _put_back(kernel, gathered)
        raise
    return _finish(kernel, mapping, vma)


def _put_back(kernel: Kernel, gathered: Gathered) -> None:
    for vma in gathered.vmas:
        kernel.add(vma)
        account(kernel.mm, vma, (vma.end - vma.start) >> kernel.shift)
        kernel.effects.remove(Unmap(vma.obj, vma.start, vma.end))


def _net_pages(kernel: Kernel, mapping: Mapping) -> int:
    """count_vma_pages_range: pages of the mapping that no VMA covers yet."""
    covered = sum(
        min(vma.end, mapping.end) - max(vma.start, mapping.start)
        for vma in kernel.space.overlapping(mapping.start, mapping.end)
    )
    return (mapping.end - mapping.start - covered) >> kernel.shift


def _merge_or_make(kernel: Kernel, mapping: Mapping) -> Vma:
    """Hook, KSM flag, merge test, else a new VMA."""
    given = mapping.given
    prepared = given is not None and bool(hook_runs_before_merge(kernel, given))
    if given is not None and prepared:
        run_hook(kernel, mapping, given)
    mapping.flags |= ksm_flag(kernel, mapping, early=True)
    prev, next = kernel.space.below(mapping.start), kernel.space.find(mapping.end)
    merged = merge_new_range(kernel, _proposal(kernel, mapping, prev, next))
    if merged is not None and prepared and merged_vma_takes_the_hooks_ops(kernel, merged, mapping):
        return kernel.put(merged, merged._replace(close=mapping.close))
    return merged or _make(kernel, mapping, None if prepared else given)


def _proposal(kernel: Kernel, mapping: Mapping, prev: Vma | None, next: Vma | None) -> Proposal:
    proposal = Proposal(mapping.start, mapping.end, mapping.pgoff, mapping.flags, prev, next)
    proposal.file = mapping.file
    if kernel.has("anon_pgoff"):
        proposal.anon_pgoff = mapping.start >> kernel.shift
    return proposal


def _make(kernel: Kernel, mapping: Mapping, hook: FileGiven | None) -> Vma:
    """__mmap_new_vma: a VMA of its own, its file's ->mmap called, perhaps merged after all by old kernels."""
    before = mapping.flags
    if tree_is_out_of_memory(kernel):
        kernel.fail("ENOMEM")
    if hook is not None:
        run_hook(kernel, mapping, hook)
    elif mapping.file is None and mapping.flags & SHARED:
        shared_memory_gets_a_file(kernel, mapping)
    changed = hook is not None and mapping.flags != before and not mapping.close
    mapping.flags |= ksm_flag(kernel, mapping, early=False)
    if changed and merge_is_retried(kernel):
        prev, next = kernel.space.below(mapping.start), kernel.space.find(mapping.end)
        if prev is not None:
            merged = merge_new_range(kernel, _proposal(kernel, mapping, prev, next), "retry")
            if merged is not None:
                return merged
    anon_pgoff = mapping.start >> kernel.shift if kernel.has("anon_pgoff") else None
    vma = Vma(
        mapping.start, mapping.end, mapping.flags, mapping.pgoff, mapping.file, mapping.anonymous,
        mapping.close,
        None, False, None, None, None, kernel.space.fresh(), mapping.kind, anon_pgoff, mapping.huge_size,
    )  # fmt: skip
    kernel.add(vma)
    kernel.effects.append(New(vma.obj, vma.start, vma.end))
    return vma


@rule("shared_anon_file", "shmem_zero_setup")
def shared_memory_gets_a_file(kernel: Kernel, mapping: Mapping) -> bool:
    """A shared anonymous mapping gets its own shmem file, after the merge test: two calls never merge."""
    mapping.file, mapping.kind, mapping.anonymous = ("shmem", kernel.space.fresh()), "shmem_anon", False
    return True


@rule("merge_retried", "mmap_region, __mmap_new_vma", until="mmap_prepare")
def merge_is_retried(kernel: Kernel) -> bool:
    """A ->mmap that changed flags gets a second merge test, if there is a previous VMA."""
    return True


def _finish(kernel: Kernel, mapping: Mapping, vma: Vma) -> Vma:
    """__mmap_complete: counters, the lock bits of what cannot be locked, SOFTDIRTY."""
    pages = (mapping.end - mapping.start) >> kernel.shift
    stat_account(kernel.mm, vma.flags, pages)
    flags = vma.flags | (new_range_is_soft_dirty(kernel) or 0)
    if flags & LOCKED:
        if mapping_cannot_be_locked(kernel, vma) or droppable_cannot_be_locked(kernel, vma):
            flags &= ~LOCKED_MASK
        else:
            kernel.mm.locked_vm += pages
    return kernel.put(vma, vma.with_flags(flags)) if flags != vma.flags else vma
