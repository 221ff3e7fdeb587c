"""Taking a range away: do_vmi_munmap, vms_gather_munmap_vmas, and the seal and count tests on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vmatrace.rules.accounting import account, split_is_one_too_many
from vmatrace.rules.context import Kernel
from vmatrace.rules.model import Operation, Unmap
from vmatrace.rules.registry import rule
from vmatrace.rules.split import cut_in_two
from vmatrace.vma import SEALED, SEALED_OLD, Vma


@rule("sealed_refuses", "can_modify_vma, vma_is_sealed", feature="mseal")
def is_sealed(kernel: Kernel, vma: Vma) -> int:
    """A sealed VMA is not unmapped, moved, resized or given other protection."""
    return vma.flags & (SEALED | SEALED_OLD)


@rule("seal_checked_first", "can_modify_mm", feature="mseal", until="mseal_per_vma")
def seals_are_checked_first(kernel: Kernel) -> bool:
    """The whole range is tested for seals before anything is done."""
    return True


def check_seals_first(kernel: Kernel, start: int, end: int) -> None:
    """can_modify_mm: EPERM if any VMA of the range is sealed (kernels that test before they start)."""
    if not seals_are_checked_first(kernel):
        return
    for vma in kernel.space.overlapping(start, end):
        if is_sealed(kernel, vma):
            kernel.fail("EPERM")


@rule("hole_needs_room", "vms_gather_munmap_vmas")
def hole_is_one_too_many(kernel: Kernel, vma: Vma, start: int, end: int) -> bool:
    """Punching a hole into one VMA needs room under max_map_count; a one-sided cut never does."""
    return start > vma.start and end < vma.end and bool(split_is_one_too_many(kernel))


@rule("munmap_new_outside", "vms_gather_munmap_vmas", feature="munmap_new_outside")
def staying_piece_is_new(kernel: Kernel) -> bool:
    """The piece that stays is the new object; the original goes."""
    return True


@dataclass(slots=True)
class Gathered:
    """What munmap or an overlay is about to remove, cut to the range and still in place."""

    vmas: Sequence[Vma] = field(default_factory=tuple)

    @property
    def length(self) -> int:
        """Total bytes."""
        return sum(vma.end - vma.start for vma in self.vmas)


def gather(kernel: Kernel, start: int, end: int) -> Gathered:
    """vms_gather_munmap_vmas: cut the edges, in address order; nothing is removed yet.

    Fails with EPERM (sealed), ENOMEM (count) or EINVAL (may_split); cuts made until then stay.
    """
    found = kernel.space.overlapping(start, end)
    if not found:
        return Gathered()
    first = found[0]
    outside = bool(staying_piece_is_new(kernel))
    if start > first.start:
        if hole_is_one_too_many(kernel, first, start, end):
            kernel.fail("ENOMEM")
        if is_sealed(kernel, first):
            kernel.fail("EPERM")
        found[0] = cut_in_two(kernel, first, start, outside)[1]
    for i, vma in enumerate(found):
        if is_sealed(kernel, vma):
            kernel.fail("EPERM")
        if vma.end > end:
            found[i] = cut_in_two(kernel, vma, end, not outside)[0]
    return Gathered(found)


def remove(kernel: Kernel, gathered: Gathered) -> None:
    """vms_complete_munmap_vmas: take the gathered VMAs out and count down."""
    if not gathered.vmas:
        return
    kernel.drop(gathered.vmas)
    for vma in gathered.vmas:
        account(kernel.mm, vma, -((vma.end - vma.start) >> kernel.shift))
        kernel.effects.append(Unmap(vma.obj, vma.start, vma.end))


@rule("munmap_arguments", "do_vmi_munmap")
def munmap_arguments_are_wrong(kernel: Kernel, start: int, length: int) -> bool:
    """munmap wants a page-aligned start, a length, and a range inside the address space."""
    size = kernel.limits.task_size
    return not kernel.aligned(start) or start > size or length > size - start or length == 0


def unmap_range(kernel: Kernel, start: int, length: int) -> None:
    """do_vmi_munmap: remove every VMA of the range, its edges cut; a range without VMAs is fine."""
    if munmap_arguments_are_wrong(kernel, start, length):
        kernel.fail("EINVAL")
    end = start + kernel.align_up(length)
    check_seals_first(kernel, start, end)
    remove(kernel, gather(kernel, start, end))


def munmap(kernel: Kernel, operation: Operation) -> int:
    """munmap(addr, len)."""
    unmap_range(kernel, operation.args["addr"], operation.args["len"])
    return 0


CALLS = {"munmap": munmap}
