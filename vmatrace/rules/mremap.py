"""mremap: resize in place, move, duplicate, move and keep - do_mremap, mremap_to, move_vma, remap_move."""

from __future__ import annotations

from dataclasses import dataclass

from vmatrace.rules.accounting import charge_is_refused, lock_limit_is_reached, may_expand
from vmatrace.rules.constants import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from vmatrace.rules.context import Kernel
from vmatrace.rules.copy import copy_vma
from vmatrace.rules.merge import note_change
from vmatrace.rules.mmap import check_picked
from vmatrace.rules.model import Operation
from vmatrace.rules.munmap import check_seals_first, is_sealed, unmap_range
from vmatrace.rules.registry import rule
from vmatrace.rules.split import check_may_split, cut_in_two
from vmatrace.rules.steps import count_growth, extend_in_place
from vmatrace.vma import (
    ACCOUNT,
    DONTEXPAND,
    LOCKED,
    LOCKED_MASK,
    MAYSHARE,
    PFNMAP,
    SHARED,
    UFFD_FLAGS,
    Vma,
)  # fmt: skip


@dataclass(slots=True)
class Remap:
    """The call's arguments, lengths rounded up to pages (struct vma_remap_struct)."""

    addr: int
    old_len: int
    new_len: int
    flags: int
    new_addr: int

    @property
    def names_address(self) -> bool:
        """FIXED or DONTUNMAP: the new address is an argument."""
        return bool(self.flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))


@rule("mremap_arguments", "check_mremap_params")
def arguments_are_wrong(kernel: Kernel, call: Remap) -> bool:
    """Unknown flags, a misaligned address, no new length, FIXED or DONTUNMAP without MAYMOVE, DONTUNMAP
    resizing."""
    flags = call.flags
    if flags & ~(MREMAP_FIXED | MREMAP_MAYMOVE | MREMAP_DONTUNMAP) or not kernel.aligned(call.addr) or not call.new_len:
        return True
    if call.names_address and not flags & MREMAP_MAYMOVE:
        return True
    return bool(flags & MREMAP_DONTUNMAP) and call.old_len != call.new_len


@rule("mremap_target", "check_mremap_params, mremap_to")
def target_is_wrong(kernel: Kernel, call: Remap) -> bool:
    """A named new address is page aligned and in the address space."""
    size = kernel.limits.task_size
    return call.new_len > size or call.new_addr > size - call.new_len or not kernel.aligned(call.new_addr)


@rule("mremap_length", "check_mremap_params", feature="multi_vma_mremap")
def new_length_is_silly(kernel: Kernel, call: Remap) -> bool:
    """No new length may exceed the address space, with or without a new address."""
    return call.new_len > kernel.limits.task_size


@rule("mremap_overlap", "vrm_overlaps")
def ranges_overlap(kernel: Kernel, call: Remap) -> bool:
    """The new range may not touch the old one."""
    return call.addr + call.old_len > call.new_addr and call.new_addr + call.new_len > call.addr


@rule("mremap_count_entry", "check_mremap_params, mremap_to", until="mremap_count_7_1")
def no_room_for_fixed_move(kernel: Kernel) -> bool:
    """FIXED and DONTUNMAP need six VMAs of room under max_map_count before anything is unmapped."""
    return kernel.mm.map_count + 2 >= kernel.limits.max_map_count - 3


@rule("mremap_count_entry_7_1", "check_mremap_params", feature="mremap_count_7_1")
def no_room_for_any_remap(kernel: Kernel, keeps_source: bool) -> bool:
    """Every mremap needs four VMAs of room; one more where DONTUNMAP never merges with its source."""
    extra = 1 if keeps_source and kernel.has("no_dontunmap_self_merge") else 0
    return kernel.mm.map_count + 4 + extra > kernel.limits.max_map_count


@rule("mremap_count_move", "prep_move_vma", until="mremap_count_7_1")
def no_room_for_move(kernel: Kernel) -> bool:
    """A move needs four VMAs of room under max_map_count."""
    return kernel.mm.map_count >= kernel.limits.max_map_count - 3


@rule("mremap_count_move_7_1", "prep_move_vma", feature="mremap_count_7_1", unobservable=True)
def no_room_for_move_7_1(kernel: Kernel) -> bool:
    """A move needs two VMAs of room under max_map_count, which the test at the entry leaves it."""
    return kernel.mm.map_count + 2 > kernel.limits.max_map_count


@rule("private_not_duplicated", "check_prep_vma, remap_is_valid")
def duplicates_private(kernel: Kernel, vma: Vma, old_len: int) -> bool:
    """An old length of zero duplicates a mapping, and only a shared one can be."""
    return not old_len and not vma.flags & (SHARED | MAYSHARE)


@rule("dontunmap_not_special", "check_prep_vma, remap_is_valid")
def keeps_special(kernel: Kernel, vma: Vma, flags: int) -> bool:
    """DONTUNMAP refuses DONTEXPAND and PFNMAP."""
    return bool(flags & MREMAP_DONTUNMAP and vma.flags & (DONTEXPAND | PFNMAP))


@rule("special_not_grown", "check_prep_vma, remap_is_valid")
def special_does_not_grow(kernel: Kernel, vma: Vma) -> int:
    """DONTEXPAND and PFNMAP mappings do not grow."""
    return vma.flags & (DONTEXPAND | PFNMAP)


@rule("uffd_lost_on_move", "mremap_userfaultfd_prep")
def move_clears_userfaultfd(kernel: Kernel, vma: Vma) -> bool:
    """Without EVENT_REMAP the VMA at the new place loses context and flags, as a whole even after a merge."""
    return vma.uffd is not None and not kernel.inputs.get("event_remap", False)


@rule("dontunmap_unlocks", "dontunmap_complete")
def kept_source_loses_lock(kernel: Kernel, vma: Vma) -> int:
    """The source that DONTUNMAP keeps loses its lock bits, all of the VMA; locked_vm stays."""
    return vma.flags & LOCKED_MASK


@rule("dontunmap_cuts_locked", "prep_move_vma", feature="dontunmap_splits_locked")
def locked_source_is_cut(kernel: Kernel, vma: Vma) -> int:
    """A locked source that DONTUNMAP keeps is cut, so that only the moved part is unlocked and uncounted."""
    return vma.flags & LOCKED


@rule("dontunmap_drops_account", "dontunmap_complete", feature="dontunmap_drops_account")
def kept_source_loses_account(kernel: Kernel, vma: Vma) -> int:
    """The source that DONTUNMAP keeps loses ACCOUNT."""
    return vma.flags & ACCOUNT


@rule("dontunmap_drops_anon_vma", "dontunmap_complete")
def kept_source_is_unfaulted(kernel: Kernel, source: Vma, copy: Vma, start: int, end: int) -> bool:
    """A source that was moved as a whole and kept has no anon_vma any more."""
    return source.obj != copy.obj and source.start == start and source.end == end and source.anon_vma is not None


@rule("dontunmap_resets_pgoff", "dontunmap_complete", feature="dontunmap_resets_pgoff")
def kept_source_starts_over(kernel: Kernel, source: Vma) -> int:
    """A source that was moved as a whole and kept has the page offset of its own address again."""
    return source.start >> kernel.shift


def _check_vma(kernel: Kernel, call: Remap, vma: Vma | None) -> Vma:
    """check_prep_vma: what one VMA must satisfy; lengths are rounded to huge pages."""
    if vma is None:
        kernel.fail("EFAULT")
    if is_sealed(kernel, vma):
        kernel.fail("EPERM")
    if vma.huge_size:
        _align_hugetlb(kernel, call, vma)
    return vma


def _align_hugetlb(kernel: Kernel, call: Remap, vma: Vma) -> None:
    size = vma.huge_size
    call.old_len, call.new_len = -(-call.old_len // size) * size, -(-call.new_len // size) * size
    if call.addr % size or call.new_addr % size or call.new_len > call.old_len:
        kernel.fail("EINVAL")


def _check_growth(kernel: Kernel, call: Remap, vma: Vma) -> None:
    """The second half of check_prep_vma (remap_is_valid): for moves and growth only."""
    if duplicates_private(kernel, vma, call.old_len) or keeps_special(kernel, vma, call.flags):
        kernel.fail("EINVAL")
    if min(call.old_len, call.new_len) > vma.end - call.addr:
        kernel.fail("EFAULT")
    if call.new_len <= call.old_len:
        return
    pgoff = vma.pgoff + ((call.addr - vma.start) >> kernel.shift)
    if pgoff + (call.new_len >> kernel.shift) >= 1 << 64:
        kernel.fail("EINVAL")
    if special_does_not_grow(kernel, vma):
        kernel.fail("EFAULT")
    delta = call.new_len - call.old_len
    if lock_limit_is_reached(kernel, vma.flags, delta):
        kernel.fail("EAGAIN")
    if not may_expand(kernel, vma.flags, delta >> kernel.shift):
        kernel.fail("ENOMEM")


def _in_place(kernel: Kernel, call: Remap) -> int:
    """mremap_at: no new address is named."""
    vma = _check_vma(kernel, call, kernel.space.at(call.addr))
    check_seals_first(kernel, call.addr, call.addr + call.old_len)
    if call.old_len == call.new_len:
        return call.addr
    if call.old_len > call.new_len:
        unmap_range(kernel, call.addr + call.new_len, call.old_len - call.new_len)
        return call.addr
    _check_growth(kernel, call, vma)
    delta = call.new_len - call.old_len
    if vma.end - call.addr == call.old_len and room_above_is_free(kernel, vma, delta):
        if charge_is_refused(kernel) and vma.flags & ACCOUNT:
            kernel.fail("ENOMEM")
        grown = extend_in_place(kernel, vma, delta)
        if grown is None:
            kernel.fail("ENOMEM")
        count_growth(kernel, grown.flags, delta >> kernel.shift)
        return call.addr
    if not call.flags & MREMAP_MAYMOVE:
        kernel.fail("ENOMEM")
    vma = _check_move(kernel, call, vma)
    picked: int | None = kernel.inputs.get("picked")
    return _move(kernel, call, vma, check_picked(kernel, picked, call.new_len))


@rule("grow_in_place", "vma_expandable, vrm_can_expand_in_place")
def room_above_is_free(kernel: Kernel, vma: Vma, delta: int) -> bool:
    """A VMA grows where it is if the old range ends where the VMA does and the room above is free."""
    end = vma.end + delta
    return end <= kernel.limits.task_size and kernel.space.is_free(vma.end, end)


def _to(kernel: Kernel, call: Remap, vma: Vma) -> int:
    """mremap_to: FIXED unmaps the target first; a shrinking call gives up its tail first."""
    if call.flags & MREMAP_FIXED:
        unmap_range(kernel, call.new_addr, call.new_len)
        vma = _check_vma_again(kernel, call.addr)
    if call.old_len > call.new_len:
        unmap_range(kernel, call.addr + call.new_len, call.old_len - call.new_len)
        call.old_len = call.new_len
        vma = _check_vma_again(kernel, call.addr)
    if not kernel.has("multi_vma_mremap"):
        _check_growth(kernel, call, vma)
    if call.flags & MREMAP_DONTUNMAP and not may_expand(kernel, vma.flags, call.old_len >> kernel.shift):
        kernel.fail("ENOMEM")
    if call.flags & MREMAP_FIXED:
        vma = _check_move(kernel, call, vma)
        return _move(kernel, call, vma, call.new_addr)
    vma = _check_move(kernel, call, vma)
    return _move(kernel, call, vma, check_picked(kernel, kernel.inputs.get("picked"), call.new_len))


def _check_vma_again(kernel: Kernel, addr: int) -> Vma:
    vma = kernel.space.at(addr)
    if vma is None:
        kernel.fail("EFAULT")
    return vma


def _check_move(kernel: Kernel, call: Remap, vma: Vma) -> Vma:
    """prep_move_vma and the charge: the map count, may_split at both ends; the VMA to move, cut if it was locked."""
    if no_room_for_move(kernel) or no_room_for_move_7_1(kernel):
        kernel.fail("ENOMEM")
    end = call.addr + call.old_len
    if call.addr != vma.start:
        check_may_split(kernel, vma, call.addr)
    if end != vma.end:
        check_may_split(kernel, vma, end)
    if call.flags & MREMAP_DONTUNMAP and locked_source_is_cut(kernel, vma):
        if call.addr != vma.start:
            vma = cut_in_two(kernel, vma, call.addr, True)[1]
        if end != vma.end:
            vma = cut_in_two(kernel, vma, end, False)[0]
    if vma.flags & ACCOUNT and charge_is_refused(kernel):
        kernel.fail("ENOMEM")
    return vma


def _move(kernel: Kernel, call: Remap, vma: Vma, new_addr: int) -> int:
    """move_vma: copy, then unmap the source or keep it."""
    keep = bool(call.flags & MREMAP_DONTUNMAP)
    pgoff = vma.pgoff + ((call.addr - vma.start) >> kernel.shift)
    copy, source = copy_vma(kernel, vma, new_addr, call.new_len, pgoff, keep)
    if move_clears_userfaultfd(kernel, copy):
        same = source == copy
        note_change(kernel, copy, "uffd")
        copy = kernel.put(copy, copy._replace(uffd=None, flags=copy.flags & ~UFFD_FLAGS))
        source = copy if same else source
    count_growth(kernel, source.flags, call.new_len >> kernel.shift)
    if keep:
        _keep_source(kernel, call, source, copy)
    elif call.old_len:
        unmap_range(kernel, call.addr, call.old_len)
    return new_addr


def _keep_source(kernel: Kernel, call: Remap, source: Vma, copy: Vma) -> None:
    """dontunmap_complete."""
    if locked_source_is_cut(kernel, source):
        kernel.mm.locked_vm -= call.old_len >> kernel.shift
    lost = (kept_source_loses_lock(kernel, source) or 0) | (kept_source_loses_account(kernel, source) or 0)
    changed = source.with_flags(source.flags & ~lost)
    if kept_source_is_unfaulted(kernel, source, copy, call.addr, call.addr + call.old_len):
        changed = changed._replace(anon_vma=None, forked=False)
    if source.obj != copy.obj and (source.start, source.end) == (call.addr, call.addr + call.old_len):
        pgoff = kept_source_starts_over(kernel, source)
        if pgoff and source.anonymous and source.file is None:
            changed = changed._replace(pgoff=pgoff)
        if pgoff and source.anon_pgoff is not None:
            changed = changed._replace(anon_pgoff=pgoff)
    if changed != source:
        note_change(kernel, source, "dontunmap")
        kernel.put(source, changed)


@rule("multi_vma_move", "remap_move", feature="multi_vma_mremap")
def several_vmas_move(kernel: Kernel, call: Remap) -> bool:
    """FIXED with equal lengths moves every VMA of the range, each alone, gaps kept."""
    return bool(call.flags & MREMAP_FIXED) and call.old_len == call.new_len


@rule("multi_move_not_allowed", "vma_multi_allowed", feature="multi_vma_mremap")
def must_move_alone(kernel: Kernel, vma: Vma) -> bool:
    """A VMA with userfaultfd, or of a file that chooses its own addresses, does not move with others."""
    return vma.uffd is not None or vma.kind in ("own_area", "sysv", "zero", "special")


def _move_range(kernel: Kernel, call: Remap) -> int:
    """remap_move: what was moved before a failure stays moved."""
    start, end = call.addr, call.addr + call.old_len
    target, last_end, result = call.new_addr, 0, None
    for found in kernel.space.overlapping(start, end):
        first = result is None
        if first and start < found.start:
            kernel.fail("EFAULT")
        addr = max(found.start, start)
        if must_move_alone(kernel, found) and (not first or found.end < end):
            kernel.fail("EFAULT")
        offset = 0 if first else found.start - last_end
        last_end = found.end
        length = min(end, found.end) - addr
        part = Remap(addr, length, length, call.flags, target + offset)
        vma = _check_vma(kernel, part, kernel.space.at(addr))
        _check_growth(kernel, part, vma)
        moved = _to(kernel, part, vma)
        result = moved if first else result
        target = moved + part.new_len
    if result is None:
        kernel.fail("EFAULT")
    return result


def mremap(kernel: Kernel, operation: Operation) -> int:
    """mremap(addr, old_len, new_len, flags, new_addr): the new address."""
    args = operation.args
    flags, new_addr = args.get("flags", 0), args.get("new_addr", 0)
    call = Remap(args["addr"], args["old_len"], args["new_len"], flags, new_addr)
    rounded = Remap(call.addr, kernel.align_up(call.old_len), kernel.align_up(call.new_len), flags, new_addr)
    several = kernel.has("multi_vma_mremap")
    if arguments_are_wrong(kernel, rounded if several else call):
        kernel.fail("EINVAL")
    call = rounded
    if not several:
        vma = _check_vma(kernel, call, kernel.space.at(call.addr))
    if new_length_is_silly(kernel, call):
        kernel.fail("EINVAL")
    if call.names_address and (target_is_wrong(kernel, call) or ranges_overlap(kernel, call)):
        kernel.fail("EINVAL")
    _check_count(kernel, call)
    if several_vmas_move(kernel, call):
        return _move_range(kernel, call)
    if not call.names_address:
        return _in_place(kernel, call)
    if several:
        vma = _check_vma(kernel, call, kernel.space.at(call.addr))
        _check_growth(kernel, call, vma)
    return _to(kernel, call, vma)


def _check_count(kernel: Kernel, call: Remap) -> None:
    if call.names_address and no_room_for_fixed_move(kernel):
        kernel.fail("ENOMEM")
    if no_room_for_any_remap(kernel, bool(call.flags & MREMAP_DONTUNMAP)):
        kernel.fail("ENOMEM")


CALLS = {"mremap": mremap}
