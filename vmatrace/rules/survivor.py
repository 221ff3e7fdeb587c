"""What the VMA that survives a merge takes over from the others: anon_vma and sticky flags."""

from __future__ import annotations

from collections.abc import Hashable

from vmatrace.rules.context import Kernel
from vmatrace.rules.registry import rule
from vmatrace.vma import MAYBE_GUARD, SOFTDIRTY, Vma


def rebuilt(
    vma: Vma,
    start: int,
    end: int,
    pgoff: int,
    flags: int,
    anon_vma: Hashable,
    forked: bool,
    anon_pgoff: int | None,
) -> Vma:
    """``vma`` with what a merge may change."""
    return Vma(
        start, end, flags, pgoff, vma.file, vma.anonymous, vma.close, anon_vma, forked, vma.uffd,
        vma.policy, vma.name,
        vma.obj, vma.kind, anon_pgoff, vma.huge_size,
    )  # fmt: skip


@rule("sticky_flags_kept", "vma_expand, vma_merge_existing_range", feature="sticky_flags")
def sticky_flags(kernel: Kernel, flags: int) -> int:
    """SOFTDIRTY and MAYBE_GUARD of every participant stay on the survivor."""
    return flags & (SOFTDIRTY | MAYBE_GUARD)


def sticky_flags_of(kernel: Kernel, proposed: int, other: int) -> int:
    """The sticky bits that a survivor gains from the range and from a VMA that it swallows."""
    return sticky_flags(kernel, proposed | other) or 0


@rule("anon_vma_cloned", "dup_anon_vma")
def clone_anon_vma(kernel: Kernel, target: Vma, source: Vma | None) -> bool:
    """An unfaulted survivor takes over the anon_vma chain of the VMA that it swallows or shrinks."""
    return target.anon_vma is None and source is not None and source.anon_vma is not None


@rule("anon_vma_cloned_from_copied", "vma_expand (copied_from)", feature="copied_from")
def clone_copied_anon_vma(kernel: Kernel, target: Vma, copied_from: Vma | None) -> bool:
    """An unfaulted survivor of a mremap move takes over the anon_vma chain of the source."""
    return target.anon_vma is None and copied_from is not None and copied_from.anon_vma is not None


def anon_vma_for(kernel: Kernel, target: Vma, swallowed: Vma | None, copied_from: Vma | None) -> tuple[Hashable, bool]:
    """The survivor's anon_vma, and whether its chain has more than one entry."""
    if clone_anon_vma(kernel, target, swallowed):
        assert swallowed is not None
        return swallowed.anon_vma, swallowed.forked
    if copied_from is not None and clone_copied_anon_vma(kernel, target, copied_from):
        return copied_from.anon_vma, copied_from.forked
    return target.anon_vma, target.forked
