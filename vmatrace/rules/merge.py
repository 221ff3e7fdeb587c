"""The merge step since v6.12: vma_merge_new_range, vma_merge_existing_range, vma_expand, commit_merge.

Older kernels' vma_merge is in ``merge_old``; both entry points here hand over to it.
"""

from __future__ import annotations

from vmatrace.rules import merge_old
from vmatrace.rules.context import Kernel
from vmatrace.rules.mergeable import can_merge_after, can_merge_before, range_is_special
from vmatrace.rules.model import Change, Merge
from vmatrace.rules.proposal import Proposal
from vmatrace.rules.registry import rule
from vmatrace.rules.survivor import anon_vma_for, rebuilt, sticky_flags_of
from vmatrace.vma import Vma


def merge_new_range(kernel: Kernel, proposal: Proposal, caller: str = "mmap") -> Vma | None:
    """vma_merge_new_range: the VMA that took the range in, or None; sets ``proposal.nomem`` on out of
    memory.

    ``caller`` (mmap, brk, copy, extend) matters to kernels before v6.12 only.
    """
    if range_is_special(kernel, proposal):
        return None
    if not kernel.has("vmg"):
        return merge_old.merge_new_range(kernel, proposal, caller)
    prev, next = proposal.prev, proposal.next
    left = prev is not None and prev.end == proposal.start and can_merge_after(kernel, proposal, prev)
    right = (
        next is not None
        and next.start == proposal.end
        and not only_looks_left(kernel, proposal)
        and can_merge_before(kernel, proposal, next)
    )
    if left and right:
        assert prev is not None
        assert next is not None
        right = not (
            neighbours_have_two_anon_vmas(kernel, prev, next)
            or next_must_not_be_deleted(kernel, next)
            or right_merge_is_off(kernel)
        )
    if not left and not right:
        return None
    return _expand_over(kernel, proposal, prev if left else None, next if right else None)


@rule("brk_looks_left", "vma_merge_new_range (just_expand)")
def only_looks_left(kernel: Kernel, proposal: Proposal) -> bool:
    """brk grows the VMA below and never joins the one above."""
    return proposal.expand_only


@rule("two_neighbour_anon_vmas", "can_vma_merge_right")
def neighbours_have_two_anon_vmas(kernel: Kernel, prev: Vma, next: Vma) -> bool:
    """Where both sides fit but carry two different anon_vmas, the range joins the previous VMA only."""
    return prev.anon_vma is not None and next.anon_vma is not None and prev.anon_vma != next.anon_vma


@rule("close_keeps_next", "can_merge_remove_vma")
def next_must_not_be_deleted(kernel: Kernel, next: Vma) -> bool:
    """A merge of both sides would delete the next VMA; with a close hook it stays, and the left merge is
    made."""
    return next.close


@rule("close_keeps_middle", "can_merge_remove_vma")
def middle_must_not_be_deleted(kernel: Kernel, middle: Vma) -> bool:
    """A VMA changed as a whole would be deleted by any merge; with a close hook there is no merge."""
    return middle.close


def right_merge_is_off(kernel: Kernel) -> bool:
    """Whether merging both sides was switched off as a rule."""
    return bool(kernel.off) and both_sides_merge(kernel) is None


@rule("both_sides_merge", "vma_merge_new_range, vma_merge_existing_range")
def both_sides_merge(kernel: Kernel) -> bool:
    """Where both neighbours fit, the previous VMA grows over the range and the next, which is deleted."""
    return True


def _expand_over(kernel: Kernel, proposal: Proposal, prev: Vma | None, next: Vma | None) -> Vma | None:
    """vma_expand as vma_merge_new_range calls it: at least one of ``prev`` and ``next`` is given."""
    target = prev or next
    assert target is not None
    if prev is not None and next is not None:
        both_sides_merge(kernel)
    removed = next if prev is not None else None
    if tree_is_out_of_memory(kernel):
        proposal.nomem = True
        return None
    flags = target.flags | sticky_flags_of(kernel, proposal.flags, removed.flags if removed else 0)
    anon_vma, forked = anon_vma_for(kernel, target, removed, proposal.copied_from)
    start = prev.start if prev else proposal.start
    end = next.end if next else proposal.end
    pgoff = target.pgoff if prev else proposal.pgoff
    anon_pgoff = target.anon_pgoff if prev else proposal.anon_pgoff
    survivor = rebuilt(target, start, end, pgoff, flags, anon_vma, forked, anon_pgoff)
    kernel.space.substitute((target, removed) if removed else (target,), (survivor,))
    side = "left" if next is None else "both" if prev is not None else "right"
    _merged(kernel, side, survivor, (removed,) if removed else ())
    return survivor


@rule("prealloc_fails", "commit_merge, __split_vma, vma_link, expand_downwards (vma_iter_prealloc)")
def tree_is_out_of_memory(kernel: Kernel) -> bool:
    """The tree node is preallocated before anything changes, so out of memory there changes nothing."""
    return kernel.limits.config.fail_prealloc


def _merged(kernel: Kernel, side: str, survivor: Vma, victims: tuple[Vma, ...]) -> None:
    kernel.mm.map_count -= len(victims)
    kernel.effects.append(Merge(side, survivor.obj, tuple(victim.obj for victim in victims)))


def merge_existing_range(kernel: Kernel, proposal: Proposal) -> Vma | None:
    """vma_merge_existing_range: the VMA that the changed range now belongs to, or None where nothing
    merged."""
    middle = proposal.middle
    assert middle is not None
    at_start, at_end = proposal.start == middle.start, proposal.end == middle.end
    if range_is_special(kernel, proposal) or range_is_inside(kernel, at_start, at_end):
        return None
    if not kernel.has("vmg"):
        return merge_old.merge_existing_range(kernel, proposal)
    prev = proposal.prev
    left = at_start and prev is not None and prev.end == proposal.start and can_merge_after(kernel, proposal, prev)
    next = kernel.space.find(proposal.end) if at_end else None
    right = next is not None and next.start == proposal.end and can_merge_before(kernel, proposal, next)
    if left and right:
        assert prev is not None
        assert next is not None
        right = not neighbours_have_two_anon_vmas(kernel, prev, next)
    if not left and not right:
        return None
    whole = at_start and at_end
    if whole and middle_must_not_be_deleted(kernel, middle):
        return None
    if left and right:
        assert next is not None
        right = not (next_must_not_be_deleted(kernel, next) or right_merge_is_off(kernel))
    if tree_is_out_of_memory(kernel):
        proposal.nomem = not quiet_on_oom(kernel, proposal)
        return None
    if left:
        return _take_left(kernel, proposal, middle, whole, next if right else None)
    assert next is not None
    return _take_right(kernel, proposal, middle, whole, next)


@rule("interior_never_merges", "vma_merge_existing_range", unobservable=True)
def range_is_inside(kernel: Kernel, at_start: bool, at_end: bool) -> bool:
    """A changed range that touches neither end of its VMA has nobody to merge with."""
    return not at_start and not at_end


@rule("uffd_release_quiet", "vma_merge_existing_range (give_up_on_oom)")
def quiet_on_oom(kernel: Kernel, proposal: Proposal) -> bool:
    """Releasing a userfaultfd keeps the unmerged VMA when the merge runs out of memory."""
    return proposal.give_up_on_oom


def _take_left(kernel: Kernel, proposal: Proposal, middle: Vma, whole: bool, next: Vma | None) -> Vma:
    """prev grows to the end of the range, or over middle and next."""
    prev = proposal.prev
    assert prev is not None
    if next is not None:
        both_sides_merge(kernel)
    end = next.end if next else proposal.end
    flags = prev.flags | sticky_flags_of(kernel, proposal.flags, next.flags if next else 0)
    donor = next if next is not None and next.anon_vma is not None else middle
    anon_vma, forked = anon_vma_for(kernel, prev, donor, None)
    survivor = rebuilt(prev, prev.start, end, prev.pgoff, flags, anon_vma, forked, prev.anon_pgoff)
    if next is not None:
        kernel.space.substitute((prev, middle, next), (survivor,))
        _merged(kernel, "both", survivor, (middle, next))
    elif whole:
        kernel.space.substitute((prev, middle), (survivor,))
        _merged(kernel, "left", survivor, (middle,))
    else:
        rest = middle.cut(end, middle.end, kernel.shift)
        kernel.space.substitute((middle, prev), (rest, survivor))
        _merged(kernel, "left", survivor, ())
    return survivor


def _take_right(kernel: Kernel, proposal: Proposal, middle: Vma, whole: bool, next: Vma) -> Vma:
    """next grows down to the start of the range; middle goes or keeps what is below."""
    pages = (next.start - proposal.start) >> kernel.shift
    flags = next.flags | sticky_flags_of(kernel, proposal.flags, 0)
    anon_vma, forked = anon_vma_for(kernel, next, middle, None)
    anon_pgoff = None if next.anon_pgoff is None else next.anon_pgoff - pages
    survivor = rebuilt(next, proposal.start, next.end, next.pgoff - pages, flags, anon_vma, forked, anon_pgoff)
    if whole:
        kernel.space.substitute((middle, next), (survivor,))
        _merged(kernel, "right", survivor, (middle,))
    else:
        rest = middle.cut(middle.start, proposal.start, kernel.shift)
        kernel.space.substitute((middle, next), (rest, survivor))
        _merged(kernel, "right", survivor, ())
    return survivor


def note_change(kernel: Kernel, vma: Vma, what: str) -> None:
    """Record that a VMA's field changed in place."""
    kernel.effects.append(Change(vma.obj, what))
