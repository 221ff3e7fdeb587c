"""A range that may join its neighbours: what the kernel keeps in struct vma_merge_struct."""

from __future__ import annotations

from collections.abc import Hashable

from vmatrace.vma import Vma


class Proposal:
    """The attributes of a range, and the VMAs around it.

    ``middle`` is the VMA that changes (existing range); ``copied_from`` the source of a mremap move;
    ``next`` and ``prev`` the neighbours, adjacent or not. ``nomem`` is set where a merge failed for want of
    memory.
    """

    __slots__ = (
        "anon_pgoff", "anon_vma", "copied_from", "end", "expand_only", "file", "flags", "give_up_on_oom",
        "middle", "name",
        "next", "nomem", "pgoff", "policy", "prev", "start", "uffd",
    )  # fmt: skip

    def __init__(
        self, start: int, end: int, pgoff: int, flags: int, prev: Vma | None = None, next: Vma | None = None
    ) -> None:
        self.start = start
        self.end = end
        self.pgoff = pgoff
        self.flags = flags
        self.prev = prev
        self.next = next
        self.file: Hashable = None
        self.anon_vma: Hashable = None
        self.policy: Hashable = None
        self.uffd: Hashable = None
        self.name: Hashable = None
        self.anon_pgoff: int | None = None
        self.middle: Vma | None = None
        self.copied_from: Vma | None = None
        self.expand_only = False
        self.give_up_on_oom = False
        self.nomem = False


def proposal_like(vma: Vma, start: int, end: int, shift: int, prev: Vma | None, next: Vma | None = None) -> Proposal:
    """A proposal over ``[start, end)`` with every attribute of ``vma`` (VMG_VMA_STATE), page offsets
    continued."""
    pages = (start - vma.start) >> shift
    proposal = Proposal(start, end, vma.pgoff + pages, vma.flags, prev, next)
    proposal.file = vma.file
    proposal.anon_vma = vma.anon_vma
    proposal.policy = vma.policy
    proposal.uffd = vma.uffd
    proposal.name = vma.name
    if vma.anon_pgoff is not None:
        proposal.anon_pgoff = vma.anon_pgoff + pages
    return proposal
