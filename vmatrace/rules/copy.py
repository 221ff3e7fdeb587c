"""The copy step of a mremap move: copy_vma, and what is undone when it fails."""

from __future__ import annotations

from vmatrace.kernel import Commit
from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import merge_new_range, tree_is_out_of_memory
from vmatrace.rules.model import Copy
from vmatrace.rules.proposal import proposal_like
from vmatrace.rules.registry import rule
from vmatrace.vma import Vma


@rule("copy_unfaulted_pgoff", "copy_vma")
def unfaulted_copy_gets_new_offset(kernel: Kernel, vma: Vma) -> bool:
    """An anonymous VMA that was never faulted takes the page offset of its new place, so that it can merge
    there."""
    return vma.anonymous and vma.anon_vma is None


@rule("copy_unfaulted_anon_pgoff", "copy_vma", feature="anon_pgoff")
def unfaulted_copy_gets_new_anon_offset(kernel: Kernel, vma: Vma) -> bool:
    """A VMA without anon_vma takes the second page offset of its new place."""
    return vma.anon_vma is None


@rule("dontunmap_no_self_merge", "copy_vma (keep_source)", feature="no_dontunmap_self_merge")
def source_is_no_neighbour(kernel: Kernel, keep_source: bool) -> bool:
    """MREMAP_DONTUNMAP does not merge the copy with its source (before v6.12: with nobody, if next to it)."""
    return keep_source


@rule(
    "copy_vma_undo",
    "copy_vma (out_vma_link), fixup_hugetlb_reservations",
    commit=Commit("ee40c9920ac2", "mm: fix copy_vma() error handling for hugetlb mappings", "v6.16"),
    feature="copy_vma_undo",
    unobservable=True,
)
def failed_link_is_undone(kernel: Kernel, vma: Vma) -> bool:
    """When the last step, vma_link, fails: reservations fixed up, close called, file put, anon_vmas
    unlinked.

    Commit 918850c13608 gave the kernel's userland tests their stub for it, and changes no behaviour.
    """
    return bool(vma.huge_size)


def copy_vma(
    kernel: Kernel,
    vma: Vma,
    address: int,
    length: int,
    pgoff: int,
    keep_source: bool = False,
) -> tuple[Vma, Vma]:
    """Copy ``vma`` to ``[address, address + length)``: (the VMA there, the source as it is now).

    The two are one where the copy merged with its own source. Fails with ENOMEM, nothing changed.
    """
    anon_pgoff = vma.anon_pgoff
    if anon_pgoff is not None:
        anon_pgoff += pgoff - vma.pgoff
    if unfaulted_copy_gets_new_offset(kernel, vma):
        pgoff = address >> kernel.shift
    if unfaulted_copy_gets_new_anon_offset(kernel, vma):
        anon_pgoff = address >> kernel.shift
    end = address + length
    if not kernel.space.is_free(address, end):
        kernel.fail("ENOMEM")
    prev, next = kernel.space.below(address), kernel.space.find(end - 1)
    if source_is_no_neighbour(kernel, keep_source):
        touches = vma in (prev, next)
        prev = None if prev == vma or (touches and not kernel.has("vmg")) else prev
        next = None if next == vma or (touches and not kernel.has("vmg")) else next
    proposal = proposal_like(vma, address, end, kernel.shift, prev, next)
    proposal.pgoff, proposal.anon_pgoff = pgoff, anon_pgoff
    proposal.copied_from = vma
    merged = merge_new_range(kernel, proposal, "copy")
    if merged is not None:
        swallowed = merged.start <= vma.start < merged.end
        return merged, merged if swallowed else vma
    if tree_is_out_of_memory(kernel):
        failed_link_is_undone(kernel, vma)
        kernel.fail("ENOMEM")
    copy = vma._replace(start=address, end=end, pgoff=pgoff, anon_pgoff=anon_pgoff, obj=kernel.space.fresh())
    kernel.add(copy)
    kernel.effects.append(Copy(copy.obj, vma.obj, address, end))
    return copy, vma
