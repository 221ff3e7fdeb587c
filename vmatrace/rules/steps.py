"""The bare steps of the scenarios: merge a new range, modify, extend, copy, expand, shrink - no system call
around."""

from __future__ import annotations

from vmatrace.rules.accounting import stat_account
from vmatrace.rules.context import Kernel
from vmatrace.rules.copy import copy_vma
from vmatrace.rules.hooks import Mapping
from vmatrace.rules.merge import merge_new_range, tree_is_out_of_memory
from vmatrace.rules.mmap_region import map_region
from vmatrace.rules.model import Grow, Merge, Operation, Shrink
from vmatrace.rules.modify import modify_flags
from vmatrace.rules.proposal import Proposal, proposal_like
from vmatrace.rules.registry import rule
from vmatrace.rules.survivor import anon_vma_for, rebuilt, sticky_flags_of
from vmatrace.vma import LOCKED, Vma


def _proposal_of(kernel: Kernel, operation: Operation) -> Proposal:
    args, inputs = operation.args, operation.inputs
    start, end = args["start"], args["end"]
    if not kernel.space.is_free(start, end):
        kernel.cannot_know("the proposed range is not free")
    prev, next = kernel.space.below(start), kernel.space.find(end - 1)
    proposal = Proposal(start, end, args.get("pgoff", start >> kernel.shift), args["flags"], prev, next)
    proposal.file = inputs.get("file")
    proposal.anon_vma = inputs.get("anon_vma")
    proposal.policy = inputs.get("policy")
    proposal.uffd = inputs.get("uffd")
    proposal.name = inputs.get("name")
    proposal.anon_pgoff = start >> kernel.shift if kernel.has("anon_pgoff") else None
    return proposal


def merge_new(kernel: Kernel, operation: Operation) -> int:
    """The merge step for a proposed new range, alone."""
    proposal = _proposal_of(kernel, operation)
    if merge_new_range(kernel, proposal) is None and proposal.nomem:
        kernel.fail("ENOMEM")
    return 0


def expand_only(kernel: Kernel, operation: Operation) -> int:
    """The merge step of brk: the left neighbour only."""
    proposal = _proposal_of(kernel, operation)
    proposal.expand_only = True
    if merge_new_range(kernel, proposal, "brk") is None and proposal.nomem:
        kernel.fail("ENOMEM")
    return 0


def modify_range(kernel: Kernel, operation: Operation) -> int:
    """A flag change of ``[start, end)`` inside one VMA, the flag write included."""
    start, end = operation.args["start"], operation.args["end"]
    vma = kernel.space.at(start)
    if vma is None or end > vma.end:
        kernel.cannot_know("the range is not inside one VMA")
    modify_flags(kernel, vma, kernel.space.below(start), start, end, operation.args["flags"])
    return 0


def nth_vma(kernel: Kernel, index: int) -> Vma:
    """The VMA number ``index`` of the space, from 0."""
    for i, vma in enumerate(kernel.space):
        if i == index:
            return vma
    kernel.cannot_know(f"there is no VMA number {index}")


def extend_in_place(kernel: Kernel, vma: Vma, delta: int) -> Vma | None:
    """vma_merge_extend: grow ``vma`` by ``delta`` bytes that are free, perhaps swallowing the next VMA."""
    next = kernel.space.find(vma.end)
    proposal = proposal_like(vma, vma.end, vma.end + delta, kernel.shift, vma, next)
    merged = merge_new_range(kernel, proposal, "extend")
    if merged is None and extension_ignores_close(kernel, vma):
        merged = kernel.put(vma, vma._replace(end=vma.end + delta))
    if merged is not None:
        kernel.effects.append(Grow(merged.obj, merged.start, merged.end))
    return merged


@rule("old_extend_with_close", "mremap (vma_adjust)", until="close_only_deleted")
def extension_ignores_close(kernel: Kernel, vma: Vma) -> bool:
    """A VMA with a close hook still grows in place, alone: mremap adjusts it without a merge."""
    return vma.close


def merge_extend(kernel: Kernel, operation: Operation) -> int:
    """Growth in place as mremap makes it."""
    vma = nth_vma(kernel, operation.args["vma"])
    end = vma.end + operation.args["delta"]
    if not kernel.space.is_free(vma.end, end):
        kernel.cannot_know("the room above the VMA is not free")
    extend_in_place(kernel, vma, operation.args["delta"])
    return 0


def copy_step(kernel: Kernel, operation: Operation) -> int:
    """The copy step of a mremap move, from the first page of a VMA; the source stays."""
    vma = nth_vma(kernel, operation.args["vma"])
    copy, _ = copy_vma(kernel, vma, operation.args["to"], operation.args["length"], vma.pgoff)
    return copy.start


def expand_vma(kernel: Kernel, vma: Vma, start: int, end: int, pgoff: int) -> Vma:
    """vma_expand: set the range of ``vma``, deleting the next VMA if the range ends where that one does."""
    next = kernel.space.find(vma.end)
    removed = next if next is not None and next.end == end else None
    if next is not None and removed is None and end > next.start:
        kernel.cannot_know("the next VMA is in the way and ends elsewhere")
    if tree_is_out_of_memory(kernel):
        kernel.fail("ENOMEM")
    flags = vma.flags | sticky_flags_of(kernel, vma.flags, removed.flags if removed else 0)
    anon_vma, forked = anon_vma_for(kernel, vma, removed, None)
    anon_pgoff = None if vma.anon_pgoff is None else vma.anon_pgoff + pgoff - vma.pgoff
    grown = rebuilt(vma, start, end, pgoff, flags, anon_vma, forked, anon_pgoff)
    kernel.space.substitute((vma, removed) if removed else (vma,), (grown,))
    if removed:
        kernel.mm.map_count -= 1
        kernel.effects.append(Merge("right", vma.obj, (removed.obj,)))
    kernel.effects.append(Grow(vma.obj, start, end))
    return grown


def shrink_vma(kernel: Kernel, vma: Vma, start: int, end: int, pgoff: int) -> Vma:
    """vma_shrink: give up the head or the tail of ``vma``; counters are the caller's."""
    if tree_is_out_of_memory(kernel):
        kernel.fail("ENOMEM")
    kernel.effects.append(Shrink(vma.obj, start, end))
    return kernel.put(vma, vma._replace(start=start, end=end, pgoff=pgoff))


def expand_step(kernel: Kernel, operation: Operation) -> int:
    """The bare vma_expand; the page offset goes down with the start."""
    vma = nth_vma(kernel, operation.args["vma"])
    start, end = operation.args["start"], operation.args["end"]
    expand_vma(kernel, vma, start, end, vma.pgoff - ((vma.start - start) >> kernel.shift))
    return 0


def shrink_step(kernel: Kernel, operation: Operation) -> int:
    """The bare vma_shrink; the page offset goes up with the start."""
    vma = nth_vma(kernel, operation.args["vma"])
    start, end = operation.args["start"], operation.args["end"]
    shrink_vma(kernel, vma, start, end, vma.pgoff + ((start - vma.start) >> kernel.shift))
    return 0


def map_step(kernel: Kernel, operation: Operation) -> int:
    """__mmap_region alone: a private anonymous fixed map of given flags; do_mmap's own tests are not made."""
    args = operation.args
    start = args["start"]
    pgoff = args.get("pgoff", start >> kernel.shift)
    mapping = Mapping(start, args["end"], args["flags"], pgoff)
    if operation.inputs.get("file") is not None:
        mapping.file, mapping.anonymous = operation.inputs["file"], False
    map_region(kernel, mapping)
    return start


def count_growth(kernel: Kernel, flags: int, pages: int) -> None:
    """The counters after a VMA of these flags grew by ``pages``."""
    stat_account(kernel.mm, flags, pages)
    if flags & LOCKED:
        kernel.mm.locked_vm += pages
