"""May a range join a neighbour? is_mergeable_vma, is_mergeable_anon_vma, can_vma_merge_before and _after."""

from __future__ import annotations

from vmatrace.kernel import Commit
from vmatrace.rules.context import Kernel
from vmatrace.rules.proposal import Proposal
from vmatrace.rules.registry import rule
from vmatrace.vma import MAYBE_GUARD, MAYWRITE, SHARED, SOFTDIRTY, SPECIAL, Vma

_LOW_WORD = (1 << 64) - 1


@rule("special_never_merges", "vma_merge_new_range, vma_merge_existing_range")
def range_is_special(kernel: Kernel, proposal: Proposal) -> int:
    """A range with IO, DONTEXPAND, PFNMAP or MIXEDMAP (so: hugetlb too) never merges."""
    return proposal.flags & SPECIAL


@rule("policy_equal", "is_mergeable_vma")
def policies_differ(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """Memory policies must be equal in content (mpol_equal); a new range has none."""
    return proposal.policy != neighbour.policy and kernel.limits.config.numa


@rule("flags_equal", "is_mergeable_vma")
def flags_differ(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> int:
    """Flags must be equal, but for those that a merge ignores."""
    difference = proposal.flags ^ neighbour.flags
    if difference:
        difference &= ~(softdirty_is_ignored(kernel, difference) or 0)
        difference &= ~(maybe_guard_is_ignored(kernel, difference) or 0)
        difference &= ~(later_words_are_ignored(kernel, difference) or 0)
    return difference


@rule("softdirty_ignored", "is_mergeable_vma")
def softdirty_is_ignored(kernel: Kernel, difference: int) -> int:
    """SOFTDIRTY never prevents a merge."""
    return difference & SOFTDIRTY


@rule("guard_flag_ignored", "is_mergeable_vma", feature="sticky_flags")
def maybe_guard_is_ignored(kernel: Kernel, difference: int) -> int:
    """MAYBE_GUARD is sticky, so it never prevents a merge."""
    return difference & MAYBE_GUARD


@rule("low_flag_word_only", "is_mergeable_vma", until="wide_flags", unobservable=True)
def later_words_are_ignored(kernel: Kernel, difference: int) -> int:
    """Only the first word of the flags is compared; no flag lives in a later one yet."""
    return difference & ~_LOW_WORD


@rule("file_equal", "is_mergeable_vma")
def files_differ(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """The struct file must be the same (not only the inode)."""
    return proposal.file != neighbour.file


@rule("uffd_equal", "is_mergeable_vm_userfaultfd_ctx")
def userfaultfd_contexts_differ(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """The userfaultfd context must be the same; a new range has none."""
    return proposal.uffd != neighbour.uffd and kernel.limits.config.uffd


@rule("anon_name_equal", "anon_vma_name_eq")
def anonymous_names_differ(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """Anonymous names must be equal as text; a new range has none."""
    return proposal.name != neighbour.name and kernel.limits.config.anon_vma_name


@rule(
    "close_refuses",
    "is_mergeable_vma",
    until="close_only_deleted",
)
def neighbour_has_close(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """A neighbour with a close hook never merges, even if it would survive."""
    return neighbour.close


@rule(
    "close_next_refuses",
    "can_vma_merge_before",
    feature="close_only_deleted",
    until="vmg",
    commit=Commit("714965ca8252", "mm/mmap: start distinguishing if vma can be removed in mergeability test", "v6.4"),
)
def next_with_close_refuses(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """The next VMA may be removed by a merge, so a close hook there refuses."""
    return neighbour.close


@rule("unfaulted_target_refuses", "is_mergeable_anon_vma", until="anon_merge_fix")
def faulted_range_meets_unfaulted_neighbour(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """A faulted range does not join an unfaulted neighbour: the empty anon_vma chain is not 'single'."""
    return proposal.anon_vma is not None and neighbour.anon_vma is None


@rule("fork_child_target_refuses", "is_mergeable_anon_vma")
def unfaulted_range_meets_fork_child(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """An unfaulted range does not join a neighbour that came faulted from a fork."""
    return proposal.anon_vma is None and neighbour.anon_vma is not None and neighbour.forked


@rule("fork_child_source_refuses", "is_mergeable_anon_vma", feature="anon_merge_fix")
def fork_child_meets_unfaulted_neighbour(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """A changed VMA that came faulted from a fork does not join an unfaulted neighbour."""
    middle = proposal.middle
    return (
        proposal.anon_vma is not None
        and neighbour.anon_vma is None
        and middle is not None
        and middle.anon_vma is not None
        and middle.forked
    )


@rule("copied_fork_child_refuses", "is_mergeable_anon_vma", feature="copied_from")
def moved_fork_child_meets_unfaulted_neighbour(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """A VMA moved by mremap that came faulted from a fork does not join an unfaulted neighbour."""
    source = proposal.copied_from
    return (
        proposal.anon_vma is not None
        and neighbour.anon_vma is None
        and source is not None
        and source.anon_vma is not None
        and source.forked
    )


@rule("two_anon_vmas_refuse", "is_mergeable_anon_vma")
def anon_vmas_are_two(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> bool:
    """Two different anon_vmas never merge."""
    return proposal.anon_vma is not None and neighbour.anon_vma is not None and proposal.anon_vma != neighbour.anon_vma


@rule("offset_linear", "can_vma_merge_before, can_vma_merge_after")
def offsets_break(kernel: Kernel, lower: int, pages: int, upper: int) -> bool:
    """Page offsets must continue across the boundary, anonymous memory included."""
    return lower + pages != upper


@rule("anon_offset_linear", "can_vma_merge_before, can_vma_merge_after", feature="anon_pgoff")
def anon_offsets_break(kernel: Kernel, proposal: Proposal, lower: int | None, pages: int, upper: int | None) -> bool:
    """A private writable file mapping needs its second page offset to continue as well."""
    cow = proposal.file is not None and proposal.flags & (SHARED | MAYWRITE) == MAYWRITE
    return cow and lower is not None and upper is not None and lower + pages != upper


def attributes_refuse(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> object:
    """is_mergeable_vma, negated."""
    return (
        policies_differ(kernel, proposal, neighbour)
        or flags_differ(kernel, proposal, neighbour)
        or files_differ(kernel, proposal, neighbour)
        or userfaultfd_contexts_differ(kernel, proposal, neighbour)
        or anonymous_names_differ(kernel, proposal, neighbour)
        or neighbour_has_close(kernel, proposal, neighbour)
    )


def anon_vma_refuses(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> object:
    """is_mergeable_anon_vma, negated."""
    if proposal.anon_vma == neighbour.anon_vma:
        return False
    return (
        faulted_range_meets_unfaulted_neighbour(kernel, proposal, neighbour)
        or unfaulted_range_meets_fork_child(kernel, proposal, neighbour)
        or fork_child_meets_unfaulted_neighbour(kernel, proposal, neighbour)
        or moved_fork_child_meets_unfaulted_neighbour(kernel, proposal, neighbour)
        or anon_vmas_are_two(kernel, proposal, neighbour)
    )


def can_merge_after(kernel: Kernel, proposal: Proposal, prev: Vma) -> bool:
    """can_vma_merge_after: the range may follow ``prev``."""
    pages = (prev.end - prev.start) >> kernel.shift
    return not (
        attributes_refuse(kernel, proposal, prev)
        or anon_vma_refuses(kernel, proposal, prev)
        or offsets_break(kernel, prev.pgoff, pages, proposal.pgoff)
        or anon_offsets_break(kernel, proposal, prev.anon_pgoff, pages, proposal.anon_pgoff)
    )


def can_merge_before(kernel: Kernel, proposal: Proposal, next: Vma) -> bool:
    """can_vma_merge_before: the range may precede ``next``."""
    pages = (proposal.end - proposal.start) >> kernel.shift
    return not (
        attributes_refuse(kernel, proposal, next)
        or next_with_close_refuses(kernel, proposal, next)
        or anon_vma_refuses(kernel, proposal, next)
        or offsets_break(kernel, proposal.pgoff, pages, next.pgoff)
        or anon_offsets_break(kernel, proposal, proposal.anon_pgoff, pages, next.anon_pgoff)
    )
