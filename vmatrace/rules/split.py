"""Cutting a VMA in two: __split_vma, split_vma, and who may refuse."""

from __future__ import annotations

from vmatrace.rules.accounting import split_is_one_too_many
from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import tree_is_out_of_memory
from vmatrace.rules.model import Split
from vmatrace.rules.registry import rule
from vmatrace.vma import MAYSHARE, Vma

#: x86_64 and arm64 with 4K pages: what one shared hugetlb page table covers.
PUD_SIZE = 1 << 30


@rule("special_not_split", "special_mapping_split")
def special_mapping_refuses(kernel: Kernel, vma: Vma) -> bool:
    """The vdso and its kind cannot be cut."""
    return vma.kind == "special"


@rule("hugetlb_split_aligned", "hugetlb_vm_op_split")
def cut_breaks_a_huge_page(kernel: Kernel, vma: Vma, address: int) -> bool:
    """A hugetlb VMA is cut at a multiple of its page size only."""
    return bool(vma.huge_size) and address % vma.huge_size != 0


def check_may_split(kernel: Kernel, vma: Vma, address: int) -> None:
    """vm_ops->may_split: fails with EINVAL where the mapping cannot be cut there."""
    if special_mapping_refuses(kernel, vma) or cut_breaks_a_huge_page(kernel, vma, address):
        kernel.fail("EINVAL")


@rule("hugetlb_unshare_early", "hugetlb_vm_op_split", until="hugetlb_unshare_in_split", unobservable=True)
def tables_unshared_before_split(kernel: Kernel, vma: Vma, address: int) -> bool:
    """Shared hugetlb page tables around the cut are unshared in may_split, even if the split then fails."""
    return _unshares(vma, address)


@rule("hugetlb_unshare_late", "hugetlb_split", feature="hugetlb_unshare_in_split", unobservable=True)
def tables_unshared_in_split(kernel: Kernel, vma: Vma, address: int) -> bool:
    """Shared hugetlb page tables around the cut are unshared under the split's locks, after the THP split."""
    return _unshares(vma, address)


def _unshares(vma: Vma, address: int) -> bool:
    """A cut inside a PUD that lies in a shareable VMA as a whole: only there are tables shared."""
    floor = address & ~(PUD_SIZE - 1)
    inside = vma.start <= floor and floor + PUD_SIZE <= vma.end
    return bool(vma.huge_size) and bool(address % PUD_SIZE) and inside and bool(vma.flags & MAYSHARE)


def cut_in_two(kernel: Kernel, vma: Vma, address: int, new_below: bool) -> tuple[Vma, Vma]:
    """__split_vma: (lower, upper). The new object is the piece below or above; nothing changes on failure."""
    check_may_split(kernel, vma, address)
    if vma.huge_size:
        tables_unshared_before_split(kernel, vma, address)
    if tree_is_out_of_memory(kernel):
        kernel.fail("ENOMEM")
    if vma.huge_size:
        tables_unshared_in_split(kernel, vma, address)
    born = kernel.space.fresh()
    lower = vma.cut(vma.start, address, kernel.shift)
    upper = vma.cut(address, vma.end, kernel.shift)
    if new_below:
        lower = lower._replace(obj=born)
    else:
        upper = upper._replace(obj=born)
    kernel.space.substitute((vma,), (lower, upper))
    kernel.mm.map_count += 1
    kernel.effects.append(Split(address, vma.obj, born, "below" if new_below else "above"))
    return lower, upper


def cut_counted(kernel: Kernel, vma: Vma, address: int, new_below: bool) -> tuple[Vma, Vma]:
    """split_vma: as ``cut_in_two``, but ENOMEM once max_map_count is reached."""
    if split_is_one_too_many(kernel):
        kernel.fail("ENOMEM")
    return cut_in_two(kernel, vma, address, new_below)
