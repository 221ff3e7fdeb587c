"""mseal: do_mseal - the range must have no hole, then each VMA is changed by mseal_apply."""

from __future__ import annotations

from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import note_change
from vmatrace.rules.model import Operation
from vmatrace.rules.modify import modify
from vmatrace.rules.registry import rule
from vmatrace.vma import SEALED, SEALED_OLD, Vma


@rule("mseal_no_holes", "range_contains_unmapped", feature="mseal")
def range_has_a_hole(kernel: Kernel, start: int, end: int) -> bool:
    """A range with a hole is refused before anything is sealed."""
    for vma in kernel.space.overlapping(start, end):
        if vma.start > start:
            return True
        start = vma.end
    return start < end


@rule("seal_added", "mseal_apply", feature="mseal")
def seal_is_added(kernel: Kernel, vma: Vma) -> int:
    """Sealing adds SEALED to the survivor's own flags; sealed VMAs are passed over."""
    if vma.flags & (SEALED | SEALED_OLD):
        return 0
    return SEALED if kernel.has("seal_bit_low") else SEALED_OLD


def mseal(kernel: Kernel, operation: Operation) -> int:
    """mseal(start, len, flags)."""
    args = operation.args
    start = args["start"]
    if not kernel.has("mseal"):
        kernel.fail("ENOSYS")
    if args.get("flags", 0) or not kernel.aligned(start):
        kernel.fail("EINVAL")
    end = start + kernel.align_up(args["len"])
    if end >= 1 << 64:
        kernel.fail("EINVAL")
    if end == start:
        return 0
    if range_has_a_hole(kernel, start, end):
        kernel.fail("ENOMEM")
    prev = kernel.space.below(start)
    while start < end:
        vma = kernel.space.at(start)
        if vma is None:
            break
        prev = _seal(kernel, vma, prev, start, min(vma.end, end))
        start = prev.end
    return 0


def _seal(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int) -> Vma:
    bit = seal_is_added(kernel, vma)
    if not bit:
        return vma
    changed, _ = modify(kernel, vma, prev, start, end, flags=vma.flags | bit)
    if changed.flags & bit:
        return changed
    note_change(kernel, changed, "flags")
    return kernel.put(changed, changed.with_flags(changed.flags | bit))


CALLS = {"mseal": mseal}
