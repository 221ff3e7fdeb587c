"""madvise and the naming of anonymous memory: madvise_walk_vmas, madvise_vma_behavior, madvise_update_vma."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from vmatrace.rules.anon_vma import populate_writes, prepare_anon_vma
from vmatrace.rules.constants import MADV
from vmatrace.rules.context import Kernel
from vmatrace.rules.ksm import fits_ksm
from vmatrace.rules.merge import note_change
from vmatrace.rules.model import KernelError, Operation
from vmatrace.rules.modify import modify, modify_flags
from vmatrace.rules.mprotect import nothing_changes
from vmatrace.rules.munmap import check_seals_first, is_sealed
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    DONTCOPY,
    DONTDUMP,
    DROPPABLE,
    HUGEPAGE,
    HUGETLB,
    IO,
    LOCKED,
    MAYBE_GUARD,
    MAYWRITE,
    MERGEABLE,
    NOHUGEPAGE,
    PFNMAP,
    PKEY_MASK,
    RAND_READ,
    SEQ_READ,
    SHARED,
    SPECIAL,
    UFFD_FLAGS,
    WIPEONFORK,
    WRITE,
    Vma,
)  # fmt: skip

_NAME = {number: name for name, number in MADV.items()}
_SET_CLEAR: dict[str, tuple[int, int]] = {
    "MADV_NORMAL": (0, RAND_READ | SEQ_READ),
    "MADV_SEQUENTIAL": (SEQ_READ, RAND_READ),
    "MADV_RANDOM": (RAND_READ, SEQ_READ),
    "MADV_DONTFORK": (DONTCOPY, 0),
    "MADV_DOFORK": (0, DONTCOPY),
    "MADV_WIPEONFORK": (WIPEONFORK, 0),
    "MADV_KEEPONFORK": (0, WIPEONFORK),
    "MADV_DONTDUMP": (DONTDUMP, 0),
    "MADV_DODUMP": (0, DONTDUMP),
    "MADV_MERGEABLE": (MERGEABLE, 0),
    "MADV_UNMERGEABLE": (0, MERGEABLE),
    "MADV_HUGEPAGE": (HUGEPAGE, NOHUGEPAGE),
    "MADV_NOHUGEPAGE": (NOHUGEPAGE, HUGEPAGE),
}
#: Advice that changes no VMA by definition: its errno depends on pages, which no rule here knows.
NO_VMA_ADVICE = frozenset(
    MADV[name]
    for name in (
        "MADV_WILLNEED", "MADV_DONTNEED", "MADV_FREE", "MADV_REMOVE", "MADV_COLD", "MADV_PAGEOUT",
        "MADV_POPULATE_READ",
        "MADV_DONTNEED_LOCKED", "MADV_COLLAPSE", "MADV_HWPOISON", "MADV_SOFT_OFFLINE", "MADV_GUARD_REMOVE",
    )
)  # fmt: skip
_DISCARDS = frozenset(("MADV_DONTFORK", "MADV_WIPEONFORK", "MADV_GUARD_INSTALL"))


@rule("seal_blocks_discard", "can_madvise_modify, can_modify_vma_madv", feature="mseal")
def seal_forbids_discard(kernel: Kernel, vma: Vma, advice: str) -> bool:
    """Advice that throws contents away is refused on sealed anonymous memory that cannot be written."""
    if advice not in _DISCARDS or vma.flags & WRITE:
        return False
    by_ops = kernel.has("seal_discard_by_ops")
    private = vma.anonymous if by_ops else vma.file is None and not vma.flags & SHARED
    return private and bool(is_sealed(kernel, vma))


@rule("dofork_not_io", "madvise_vma_behavior")
def io_is_never_forked(kernel: Kernel, vma: Vma, advice: str) -> bool:
    """MADV_DOFORK is refused on IO mappings."""
    return advice == "MADV_DOFORK" and bool(vma.flags & IO)


@rule("wipeonfork_anonymous", "madvise_vma_behavior")
def only_private_anonymous_is_wiped(kernel: Kernel, vma: Vma, advice: str) -> bool:
    """MADV_WIPEONFORK takes private anonymous memory only."""
    return advice == "MADV_WIPEONFORK" and (vma.file is not None or bool(vma.flags & SHARED))


@rule("droppable_stays_wiped", "madvise_vma_behavior", feature="droppable")
def droppable_stays_wiped(kernel: Kernel, vma: Vma, advice: str) -> bool:
    """MADV_KEEPONFORK and MADV_DODUMP are refused on droppable memory."""
    return advice in ("MADV_KEEPONFORK", "MADV_DODUMP") and bool(vma.flags & DROPPABLE)


@rule("special_not_dumped", "madvise_vma_behavior")
def special_is_not_dumped(kernel: Kernel, vma: Vma, advice: str) -> bool:
    """MADV_DODUMP is refused on special mappings other than hugetlb."""
    return advice == "MADV_DODUMP" and not vma.flags & HUGETLB and bool(vma.flags & SPECIAL)


@rule("mergeable_unfit_ignored", "ksm_madvise")
def unfit_for_ksm(kernel: Kernel, vma: Vma, advice: str) -> bool:
    """MADV_MERGEABLE on a VMA that KSM cannot take returns 0 and changes nothing."""
    return advice == "MADV_MERGEABLE" and not fits_ksm(vma.flags, vma.kind)


@rule("madvise_eagain", "madvise_vma_behavior, madvise_behavior")
def out_of_memory_reads_as_again(kernel: Kernel, errno: str) -> bool:
    """madvise turns ENOMEM of a split into EAGAIN."""
    return errno == "ENOMEM"


@rule("guard_flag_set", "madvise_guard_install", feature="sticky_flags")
def guard_sets_flag(kernel: Kernel, vma: Vma) -> int:
    """MADV_GUARD_INSTALL sets MAYBE_GUARD on the whole VMA, without a split."""
    return MAYBE_GUARD & ~vma.flags


@rule("guard_prepares_anon_vma", "madvise_guard_install", feature="guard_regions")
def guard_needs_anon_vma(kernel: Kernel, vma: Vma) -> bool:
    """MADV_GUARD_INSTALL gives the VMA an anon_vma."""
    return vma.anon_vma is None and not (guard_leaves_files_alone(kernel, vma) or False)


@rule("guard_anon_only", "madvise_guard_install", feature="guard_av_anon_only")
def guard_leaves_files_alone(kernel: Kernel, vma: Vma) -> bool:
    """Only an anonymous VMA needs an anon_vma for guard regions."""
    return not vma.anonymous


def _flags_after(kernel: Kernel, vma: Vma, advice: str) -> int:
    if seal_forbids_discard(kernel, vma, advice):
        kernel.fail("EPERM")
    refused = (
        io_is_never_forked(kernel, vma, advice)
        or only_private_anonymous_is_wiped(kernel, vma, advice)
        or droppable_stays_wiped(kernel, vma, advice)
        or special_is_not_dumped(kernel, vma, advice)
    )
    if refused:
        kernel.fail("EINVAL")
    if unfit_for_ksm(kernel, vma, advice):
        return vma.flags
    to_set, to_clear = _SET_CLEAR[advice]
    return vma.flags & ~to_clear | to_set


Visit = Callable[[Vma, "Vma | None", int, int], Vma]


def _walk(kernel: Kernel, start: int, end: int, visit: Visit) -> None:
    """madvise_walk_vmas: visit each VMA's part of the range; a gap is ENOMEM, but only at the end."""
    unmapped = False
    prev = kernel.space.below(start)
    while start < end:
        vma = kernel.space.find(start)
        if vma is None or vma.start >= end:
            unmapped = True
            break
        if vma.start > start:
            unmapped, start = True, vma.start
            prev = kernel.space.below(start)
        try:
            prev = visit(vma, prev, start, min(vma.end, end))
        except KernelError as error:
            if out_of_memory_reads_as_again(kernel, error.errno):
                kernel.fail("EAGAIN")
            raise
        start = prev.end
    if unmapped and gaps_are_reported(kernel):
        kernel.fail("ENOMEM")


@rule("gap_reported_last", "madvise_walk_vmas")
def gaps_are_reported(kernel: Kernel) -> bool:
    """A gap in the range does not stop madvise; ENOMEM is returned when the rest is done."""
    return True


def advise(kernel: Kernel, start: int, length: int, behavior: int) -> int:
    """do_madvise for one range."""
    advice = _NAME.get(behavior)
    if advice is None or not _is_valid(kernel, advice) or not kernel.aligned(start):
        kernel.fail("EINVAL")
    end = start + kernel.align_up(length)
    if end >= 1 << 64:
        kernel.fail("EINVAL")
    if end == start or behavior in NO_VMA_ADVICE:
        return 0
    check = advice in _DISCARDS
    if check:
        check_seals_first(kernel, start, end)
    if advice == "MADV_GUARD_INSTALL":
        _walk(kernel, start, end, lambda vma, prev, low, high: _install_guard(kernel, vma))
    elif advice == "MADV_POPULATE_WRITE":
        _populate(kernel, start, end)
    else:
        _walk(kernel, start, end, lambda vma, prev, low, high: _update(kernel, vma, prev, low, high, advice))
    return 0


def _is_valid(kernel: Kernel, advice: str) -> bool:
    config = kernel.limits.config
    if advice in ("MADV_MERGEABLE", "MADV_UNMERGEABLE"):
        return config.ksm
    if advice in ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_COLLAPSE"):
        return config.thp
    if advice in ("MADV_GUARD_INSTALL", "MADV_GUARD_REMOVE"):
        return kernel.has("guard_regions")
    return True


def _update(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int, advice: str) -> Vma:
    flags = _flags_after(kernel, vma, advice)
    if nothing_changes(kernel, vma.flags, flags):
        return vma
    return modify_flags(kernel, vma, prev, start, end, flags)


@rule("guard_valid", "is_valid_guard_vma", feature="guard_regions")
def cannot_hold_guards(kernel: Kernel, vma: Vma) -> int:
    """Guard regions are refused in special, hugetlb and locked VMAs, and at first in all but writable
    anonymous ones."""
    refused = vma.flags & (SPECIAL | HUGETLB | LOCKED)
    if not kernel.has("mmap_prepare"):  # file-backed guard regions came in v6.15, between two named releases
        refused |= not (vma.anonymous and vma.flags & MAYWRITE)
    return refused


def _install_guard(kernel: Kernel, vma: Vma) -> Vma:
    if seal_forbids_discard(kernel, vma, "MADV_GUARD_INSTALL"):
        kernel.fail("EPERM")
    if cannot_hold_guards(kernel, vma):
        kernel.fail("EINVAL")
    bit = guard_sets_flag(kernel, vma)
    if bit:
        note_change(kernel, vma, "flags")
        vma = kernel.put(vma, vma.with_flags(vma.flags | bit))
    return prepare_anon_vma(kernel, vma) if guard_needs_anon_vma(kernel, vma) else vma


@rule("populate_write_needs_write", "madvise_populate, check_vma_flags")
def cannot_be_written(kernel: Kernel, vma: Vma) -> bool:
    """MADV_POPULATE_WRITE is refused on mappings that are not writable, and on IO and PFNMAP."""
    return not vma.flags & WRITE or bool(vma.flags & (IO | PFNMAP))


def _populate(kernel: Kernel, start: int, end: int) -> None:
    """madvise_populate: stops at the first gap (ENOMEM) or VMA that cannot be written (EINVAL)."""
    first = kernel.space.find(start)
    # Older kernels pass over a gap at the head and report it when the rest is done.
    late_gap = not kernel.has("vmg") and first is not None and first.start > start
    if late_gap and first is not None:
        start = min(first.start, end)
    while start < end:
        vma = kernel.space.at(start)
        if vma is None:
            kernel.fail("ENOMEM")
        if cannot_be_written(kernel, vma):
            kernel.fail("EINVAL")
        if vma.flags & (MAYBE_GUARD | UFFD_FLAGS | PKEY_MASK) or vma.file is not None:
            kernel.maybe_errnos.update(("EFAULT", "EINVAL"))
        if populate_writes(kernel, vma):
            prepare_anon_vma(kernel, vma)
        start = vma.end
    if late_gap:
        kernel.fail("ENOMEM")


def madvise(kernel: Kernel, operation: Operation) -> int:
    """madvise(start, len_in, behavior)."""
    args = operation.args
    return advise(kernel, args["start"], args["len_in"], args["behavior"])


@rule("name_anonymous_only", "madvise_vma_behavior (__MADV_SET_ANON_VMA_NAME)")
def files_have_no_anonymous_name(kernel: Kernel, vma: Vma) -> bool:
    """Only anonymous memory, shared anonymous included, can be named."""
    return vma.file is not None and vma.kind != "shmem_anon"


@rule("name_writes_old_flags", "madvise_update_vma")
def old_flags_are_written(kernel: Kernel, vma: Vma, old: int) -> bool:
    """Naming writes back the flags that the VMA had before, which undoes what a merge made sticky."""
    return vma.flags != old


def set_name(kernel: Kernel, start: int, length: int, name: Hashable) -> int:
    """prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME): madvise_set_anon_name."""
    if not kernel.limits.config.anon_vma_name or not kernel.aligned(start):
        kernel.fail("EINVAL")
    end = start + kernel.align_up(length)
    if end >= 1 << 64:
        kernel.fail("EINVAL")
    if end > start:
        _walk(kernel, start, end, lambda vma, prev, low, high: _rename(kernel, vma, prev, low, high, name))
    return 0


def _rename(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int, name: Hashable) -> Vma:
    if files_have_no_anonymous_name(kernel, vma):
        kernel.fail("EBADF")
    if vma.name == name:
        return vma
    old = vma.flags
    changed, _ = modify(kernel, vma, prev, start, end, name=name)
    if old_flags_are_written(kernel, changed, old):
        changed = kernel.put(changed, changed.with_flags(old))
    if changed.name != name:
        note_change(kernel, changed, "name")
        changed = kernel.put(changed, changed._replace(name=name))
    return changed


CALLS = {"madvise": madvise}
