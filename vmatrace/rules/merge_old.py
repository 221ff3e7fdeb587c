"""The merge step before v6.12: vma_merge with its numbered cases, and mmap_region's own way to extend
neighbours."""

from __future__ import annotations

from vmatrace.rules.context import Kernel
from vmatrace.rules.mergeable import can_merge_after, can_merge_before
from vmatrace.rules.model import Merge
from vmatrace.rules.proposal import Proposal
from vmatrace.rules.registry import rule
from vmatrace.rules.survivor import anon_vma_for, rebuilt
from vmatrace.vma import Vma


@rule("old_mmap_next_first", "mmap_region", until="vmg")
def next_is_tested_first(kernel: Kernel, caller: str) -> bool:
    """mmap tests the next VMA first, then the previous one against the next one's anon_vma."""
    return caller == "mmap"


def merge_new_range(kernel: Kernel, proposal: Proposal, caller: str) -> Vma | None:
    """A new range: mmap_region's own tests for mmap, vma_merge for the rest, prev alone for brk."""
    prev, next = proposal.prev, proposal.next
    if prev is not None and prev.end != proposal.start:
        prev = None
    if (next is not None and next.start != proposal.end) or proposal.expand_only:
        next = None
    if next_is_tested_first(kernel, caller):
        right = next is not None and can_merge_before(kernel, proposal, next)
        if right:
            assert next is not None
            proposal.anon_vma, proposal.uffd = next.anon_vma, next.uffd
        left = prev is not None and can_merge_after(kernel, proposal, prev)
    else:
        left = prev is not None and can_merge_after(kernel, proposal, prev)
        right = next is not None and can_merge_before(kernel, proposal, next)
        if left and right:
            assert prev is not None
            assert next is not None
            right = not _two_anon_vmas(prev, next)
    if not left and not right:
        return None
    return _extend(kernel, proposal, prev if left else None, next if right else None)


def _two_anon_vmas(prev: Vma, next: Vma) -> bool:
    return prev.anon_vma is not None and next.anon_vma is not None and prev.anon_vma != next.anon_vma


def _extend(kernel: Kernel, proposal: Proposal, prev: Vma | None, next: Vma | None) -> Vma | None:
    target = prev or next
    assert target is not None
    if kernel.limits.config.fail_prealloc:
        proposal.nomem = True
        return None
    pages = (proposal.end - proposal.start) >> kernel.shift
    removed = next if prev is not None else None
    anon_vma, forked = anon_vma_for(kernel, target, removed, None)
    pgoff = target.pgoff if prev else target.pgoff - pages
    start = prev.start if prev else proposal.start
    end = next.end if next else proposal.end
    survivor = rebuilt(target, start, end, pgoff, target.flags, anon_vma, forked, None)
    kernel.space.substitute((target, removed) if removed else (target,), (survivor,))
    kernel.mm.map_count -= 1 if removed else 0
    side = "left" if next is None else "both" if prev is not None else "right"
    kernel.effects.append(Merge(side, survivor.obj, (removed.obj,) if removed else ()))
    return survivor


@rule("old_case7_close", "vma_merge", feature="close_only_deleted", until="vmg")
def deleted_middle_has_close(kernel: Kernel, middle: Vma, whole: bool) -> bool:
    """Case 7 deletes the changed VMA, so its close hook refuses the merge."""
    return whole and middle.close


def merge_existing_range(kernel: Kernel, proposal: Proposal) -> Vma | None:
    """vma_merge, cases 4 to 8: part or all of ``proposal.middle`` changes. Any failure reads as no merge."""
    middle = proposal.middle
    assert middle is not None
    at_start, at_end = proposal.start == middle.start, proposal.end == middle.end
    whole = at_start and at_end
    prev = proposal.prev if at_start and proposal.prev is not None and proposal.prev.end == middle.start else None
    next = kernel.space.at(proposal.end) if at_end else None
    left = prev is not None and can_merge_after(kernel, proposal, prev)
    right = next is not None and can_merge_before(kernel, proposal, next)
    if left and right:
        assert prev is not None
        assert next is not None
        right = not _two_anon_vmas(prev, next)
    if not (left or right) or kernel.limits.config.fail_prealloc:
        return None
    if left and not right and deleted_middle_has_close(kernel, middle, whole):
        return None
    if left:
        assert prev is not None
        return _into_prev(kernel, proposal, prev, middle, whole, next if right else None)
    assert next is not None
    return _into_next(kernel, proposal, middle, whole, next)


def _into_prev(kernel: Kernel, proposal: Proposal, prev: Vma, middle: Vma, whole: bool, next: Vma | None) -> Vma:
    donor = next if next is not None and next.anon_vma is not None else middle
    anon_vma, forked = anon_vma_for(kernel, prev, donor, None)
    end = next.end if next else proposal.end
    survivor = rebuilt(prev, prev.start, end, prev.pgoff, prev.flags, anon_vma, forked, None)
    victims = (middle, next) if next else (middle,) if whole else ()
    if victims:
        kernel.space.substitute((prev, *victims), (survivor,))
    else:
        kernel.space.substitute((middle, prev), (middle.cut(end, middle.end, kernel.shift), survivor))
    kernel.mm.map_count -= len(victims)
    side = "both" if next else "left"
    kernel.effects.append(Merge(side, survivor.obj, tuple(victim.obj for victim in victims)))
    return survivor


def _into_next(kernel: Kernel, proposal: Proposal, middle: Vma, whole: bool, next: Vma) -> Vma:
    pages = (next.start - proposal.start) >> kernel.shift
    anon_vma, forked = anon_vma_for(kernel, next, middle, None)
    survivor = rebuilt(next, proposal.start, next.end, next.pgoff - pages, next.flags, anon_vma, forked, None)
    if whole:
        kernel.space.substitute((middle, next), (survivor,))
        kernel.mm.map_count -= 1
    else:
        kernel.space.substitute((middle, next), (middle.cut(middle.start, proposal.start, kernel.shift), survivor))
    kernel.effects.append(Merge("right", survivor.obj, (middle.obj,) if whole else ()))
    return survivor
