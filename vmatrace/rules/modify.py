"""Changing a range inside one VMA: vma_modify and its callers' wrappers - merge if possible, else cut."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import merge_existing_range, note_change
from vmatrace.rules.proposal import Proposal, proposal_like
from vmatrace.rules.registry import rule
from vmatrace.rules.split import cut_counted
from vmatrace.vma import MAYBE_GUARD, SOFTDIRTY, Vma

#: Stands for "leave this attribute as it is" (None means absent).
KEEP: Final[Hashable] = ("keep",)


def modify(
    kernel: Kernel,
    vma: Vma,
    prev: Vma | None,
    start: int,
    end: int,
    *,
    flags: int | None = None,
    policy: Hashable = KEEP,
    name: Hashable = KEEP,
    uffd: Hashable = KEEP,
    give_up_on_oom: bool = False,
) -> tuple[Vma, bool]:
    """vma_modify: the VMA that holds ``[start, end)`` now, attributes not yet written, and whether a merge
    made it.

    ``prev`` is the VMA below, or ``vma`` itself where the range starts inside it. Fails with ENOMEM; the
    first of two cuts is not undone where the second fails.
    """
    proposal = proposal_like(vma, start, end, kernel.shift, prev)
    proposal.middle = vma
    proposal.give_up_on_oom = give_up_on_oom
    if flags is not None:
        proposal.flags = flags
    if policy is not KEEP:
        proposal.policy = policy
    if name is not KEEP:
        proposal.name = name
    if uffd is not KEEP:
        proposal.uffd = uffd
    merged = merge_existing_range(kernel, proposal)
    if merged is not None:
        return merged, True
    if modify_is_out_of_memory(kernel, proposal):
        kernel.fail("ENOMEM")
    if vma.start < start:
        _, vma = cut_counted(kernel, vma, start, True)
    if vma.end > end:
        vma, _ = cut_counted(kernel, vma, end, False)
    return vma, False


@rule("modify_nomem", "vma_modify", feature="vmg")
def modify_is_out_of_memory(kernel: Kernel, proposal: Proposal) -> bool:
    """A merge that ran out of memory fails the call: no split is tried."""
    return proposal.nomem


@rule("sticky_flags_handed_back", "vma_modify_flags", feature="sticky_flags")
def merged_flags_are_handed_back(kernel: Kernel, merged: Vma, flags: int) -> int:
    """After a merge the caller writes the survivor's flags, so that its sticky bits stay."""
    return (merged.flags & (SOFTDIRTY | MAYBE_GUARD)) & ~flags


def modify_flags(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int, flags: int) -> Vma:
    """vma_modify_flags and the write of the flags that follows it: the VMA as it is afterwards."""
    changed, merged = modify(kernel, vma, prev, start, end, flags=flags)
    if merged:
        flags |= merged_flags_are_handed_back(kernel, changed, flags) or 0
    return write_flags(kernel, changed, flags)


def write_flags(kernel: Kernel, vma: Vma, flags: int) -> Vma:
    """vm_flags_reset: set the flags of the whole VMA."""
    if flags == vma.flags:
        return vma
    note_change(kernel, vma, "flags")
    return kernel.put(vma, vma.with_flags(flags))
