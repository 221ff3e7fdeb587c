"""When a VMA gains an anon_vma, and whose it takes: __anon_vma_prepare, find_mergeable_anon_vma."""

from __future__ import annotations

from collections.abc import Hashable

from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import note_change
from vmatrace.rules.model import Operation
from vmatrace.rules.registry import rule
from vmatrace.vma import ACCESS, HUGETLB, MAYBE_GUARD, SHARED, SOFTDIRTY, WRITE, Vma


def _compatible(kernel: Kernel, lower: Vma, upper: Vma) -> bool:
    """anon_vma_compatible: adjacent, same policy and file, flags equal but for what mprotect may change."""
    if lower.end != upper.start or lower.policy != upper.policy or lower.file != upper.file:
        return False
    ignored = ACCESS | SOFTDIRTY | (MAYBE_GUARD if kernel.has("sticky_flags") else 0)
    if (lower.flags ^ upper.flags) & ~ignored:
        return False
    pages = (upper.start - lower.start) >> kernel.shift
    if lower.pgoff + pages != upper.pgoff:
        return False
    return lower.anon_pgoff is None or upper.anon_pgoff is None or lower.anon_pgoff + pages == upper.anon_pgoff


@rule("anon_vma_reused_next", "find_mergeable_anon_vma")
def next_has_anon_vma_to_share(kernel: Kernel, vma: Vma) -> Hashable:
    """A VMA that needs an anon_vma takes the next VMA's first, if that chain is single and the two fit."""
    next = kernel.space.find(vma.end)
    if next is None or next.forked or not _compatible(kernel, vma, next):
        return None
    return next.anon_vma


@rule("anon_vma_reused_prev", "find_mergeable_anon_vma")
def prev_has_anon_vma_to_share(kernel: Kernel, vma: Vma) -> Hashable:
    """Else it takes the previous VMA's, if that chain is single and the two fit."""
    prev = kernel.space.below(vma.start)
    if prev is None or prev.forked or not _compatible(kernel, prev, vma):
        return None
    return prev.anon_vma


def prepare_anon_vma(kernel: Kernel, vma: Vma) -> Vma:
    """__anon_vma_prepare: the VMA with an anon_vma, taken from a neighbour or new."""
    if vma.anon_vma is not None:
        return vma
    shared = next_has_anon_vma_to_share(kernel, vma)
    if shared is None:
        shared = prev_has_anon_vma_to_share(kernel, vma)
    if shared is None:
        shared = kernel.inputs.get("av")
    if shared is None:
        shared = kernel.space.fresh()
    note_change(kernel, vma, "anon_vma")
    return kernel.put(vma, vma._replace(anon_vma=shared, forked=False))


@rule("fault_gives_anon_vma", "vmf_anon_prepare")
def write_fault_needs_anon_vma(kernel: Kernel, vma: Vma, write: bool) -> bool:
    """A write fault on a private page gives the VMA an anon_vma; a read fault and a shared page do not."""
    return write and not vma.flags & SHARED and vma.anon_vma is None


def fault(kernel: Kernel, operation: Operation) -> int:
    """A page fault at ``address`` (``write``: for writing) inside a VMA; it changes no layout."""
    vma = kernel.space.at(operation.args["address"])
    if vma is None:
        kernel.fail("EFAULT")
    if write_fault_needs_anon_vma(kernel, vma, bool(operation.args.get("write", 1))):
        prepare_anon_vma(kernel, vma)
    return 0


def populate(kernel: Kernel, operation: Operation) -> int:
    """What populating ``[addr, addr + len)`` gives (MAP_POPULATE, mlock): private writable VMAs an
    anon_vma."""
    start = operation.args["addr"]
    for vma in kernel.space.overlapping(start, start + operation.args["len"]):
        if populate_writes(kernel, vma):
            prepare_anon_vma(kernel, vma)
    return 0


def populate_writes(kernel: Kernel, vma: Vma) -> bool:
    """populate_vma_page_range faults for writing where the VMA is private and writable."""
    return vma.flags & (WRITE | SHARED) == WRITE and not vma.flags & HUGETLB and vma.anon_vma is None


CALLS = {"fault": fault, "populate": populate}
