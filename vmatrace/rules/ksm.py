"""The KSM opt-in of a process: which VMAs carry MERGEABLE, and when a new mapping gets it."""

from __future__ import annotations

from typing import Protocol

from vmatrace.rules.context import Kernel
from vmatrace.rules.model import FileGiven
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    DONTEXPAND,
    DROPPABLE,
    HUGETLB,
    IO,
    MAYSHARE,
    MERGEABLE,
    MIXEDMAP,
    PFNMAP,
    SHARED,
)  # fmt: skip

_UNFIT = SHARED | MAYSHARE | PFNMAP | IO | DONTEXPAND | HUGETLB | MIXEDMAP | DROPPABLE


class HasKsmFields(Protocol):
    """What is asked of a mapping."""

    flags: int
    kind: str
    given: FileGiven | None


def fits_ksm(flags: int, kind: str) -> bool:
    """ksm_compatible: private, not special, not droppable, not dax."""
    return not flags & _UNFIT and kind != "dax"


@rule("ksm_flag_early", "ksm_vma_flags, can_set_ksm_flags_early", feature="early_ksm_flag")
def flag_is_set_before_merge(kernel: Kernel, mapping: HasKsmFields) -> bool:
    """MERGEABLE is set before the merge test for anonymous memory, shmem and files with mmap_prepare."""
    given = mapping.given
    return given is None or given.prepare or given.kind == "shmem"


@rule("ksm_opt_in", "ksm_add_vma, ksm_vma_flags", feature="ksm_opt_in")
def process_opted_in(kernel: Kernel, flags: int, kind: str) -> int:
    """After PR_SET_MEMORY_MERGE each new fit VMA carries MERGEABLE."""
    return MERGEABLE if kernel.mm.ksm and fits_ksm(flags, kind) else 0


def ksm_flag(kernel: Kernel, mapping: HasKsmFields, early: bool) -> int:
    """The bit to add before (``early``) or after the merge test; the other call adds nothing."""
    if not kernel.mm.ksm:
        return 0
    if bool(flag_is_set_before_merge(kernel, mapping)) is not early:
        return 0
    return process_opted_in(kernel, mapping.flags, mapping.kind) or 0
