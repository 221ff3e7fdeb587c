"""What a file does to its mapping: ->mmap, mmap_prepare, its descriptor, and the compat layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from vmatrace.kernel import Commit
from vmatrace.rules.accounting import lock_limit_is_reached
from vmatrace.rules.context import Kernel
from vmatrace.rules.model import FileGiven
from vmatrace.rules.registry import rule
from vmatrace.vma import DONTDUMP, DONTEXPAND, HUGETLB, LOCKED, MAYSHARE, SHARED, Vma


@dataclass(slots=True)
class Mapping:
    """A mapping on its way (struct mmap_state); hooks may change file, flags and pgoff."""

    start: int
    end: int
    flags: int
    pgoff: int
    given: FileGiven | None = None
    file: Hashable = None
    kind: str = ""
    anonymous: bool = True
    close: bool = False
    huge_size: int = 0


@rule("hook_before_merge", "call_mmap_prepare", feature="mmap_prepare")
def hook_runs_before_merge(kernel: Kernel, given: FileGiven) -> bool:
    """mmap_prepare sets flags and file in the descriptor before the merge test."""
    return given.prepare


@rule("merged_gets_ops", "set_vma_user_defined_fields", feature="mmap_prepare", until="merged_keeps_ops")
def merged_vma_takes_the_hooks_ops(kernel: Kernel, vma: Vma, mapping: Mapping) -> bool:
    """The vm_ops that mmap_prepare asks for replace those of the VMA that the mapping merged into."""
    return vma.close != mapping.close


@rule("secretmem_shared", "secretmem_mmap, secretmem_mmap_prepare")
def secret_memory_must_be_shared(kernel: Kernel, flags: int) -> bool:
    """Secret memory cannot be mapped private."""
    return not flags & (SHARED | MAYSHARE)


@rule("secretmem_not_dumped", "secretmem_mmap, secretmem_mmap_prepare")
def secret_memory_is_not_dumped(kernel: Kernel) -> int:
    """The hook of secret memory sets DONTDUMP."""
    return DONTDUMP


@rule("secretmem_locked", "secretmem_mmap, secretmem_mmap_prepare", until="secretmem_unlocked")
def secret_memory_is_locked(kernel: Kernel) -> int:
    """The hook of secret memory sets LOCKED, before the merge test since v6.16."""
    return LOCKED


@rule("hugetlb_flags", "hugetlbfs_file_mmap, hugetlbfs_file_mmap_prepare")
def hugetlb_marks_itself(kernel: Kernel) -> int:
    """The hook of hugetlbfs sets HUGETLB and DONTEXPAND, so its mappings never merge nor grow."""
    return HUGETLB | DONTEXPAND


@dataclass(slots=True)
class Descriptor:
    """struct vm_area_desc: what an mmap_prepare hook sees. Start and end are fixed."""

    start: int
    end: int
    pgoff: int
    flags: int
    #: The file that was called: fixed where ``desc_vm_file`` is there.
    file: Hashable
    #: The file that the VMA will have.
    vm_file: Hashable
    close: bool = False


@rule("one_hook", "can_mmap_file, file_has_valid_mmap_hooks", feature="mmap_prepare")
def file_has_two_hooks(kernel: Kernel, given: FileGiven) -> bool:
    """A file has exactly one of mmap and mmap_prepare, else it cannot be mapped."""
    return given.both_hooks


@rule("called_file_fixed", "call_mmap_prepare", feature="desc_vm_file", unobservable=True)
def called_file_stays(kernel: Kernel) -> bool:
    """The hook may replace the VMA's file, but no longer the file that was called."""
    return True


@rule(
    "compat_layer",
    "compat_vma_mmap_prepare, compat_vma_mmap",
    feature="compat_mmap_prepare",
    commit=Commit("bb666b7c2707", "mm: add mmap_prepare() compatibility layer for nested file systems", "v6.16"),
)
def nested_hook_runs_on_the_vma(kernel: Kernel, given: FileGiven) -> bool:
    """A stacked ->mmap runs the other file's mmap_prepare on a descriptor of the VMA, merging decided."""
    return given.nested_prepare


@rule("compat_only_adds_flags", "compat_vma_mmap_prepare", until="compat_assigns_flags")
def nested_hook_only_adds_flags(kernel: Kernel, before: int, wanted: int) -> int:
    """The compat layer ORs the hook's flags into the VMA: the hook cannot clear one."""
    return before & ~wanted


@rule("compat_overwrites_ops", "compat_vma_mmap_prepare, compat_vma_mmap", feature="compat_mmap_prepare")
def nested_hook_replaces_ops(kernel: Kernel, mapping: Mapping, descriptor: Descriptor) -> bool:
    """The compat layer overwrites vm_ops and private data, whatever the stacked file had set."""
    return mapping.close != descriptor.close


@rule("compat_action_at_once", "compat_vma_mmap", feature="desc_action", unobservable=True)
def nested_action_runs_at_once(kernel: Kernel) -> bool:
    """An action that the nested hook asks for runs inside the compat layer, not after insertion."""
    return True


def describe(mapping: Mapping, given: FileGiven) -> Descriptor:
    """The descriptor that a hook is given."""
    return Descriptor(mapping.start, mapping.end, mapping.pgoff, mapping.flags, given.identity, given.identity)


def run_hook(kernel: Kernel, mapping: Mapping, given: FileGiven) -> None:
    """The driver's ->mmap or mmap_prepare, as the inputs say: it may fail, replace the file, change flags."""
    if given.hook_error is not None:
        kernel.fail(given.hook_error)
    if given.kind == "secretmem":
        _secret_memory(kernel, mapping)
    descriptor = describe(mapping, given)
    descriptor.flags = (mapping.flags | given.set_flags) & ~given.clear_flags
    descriptor.vm_file = given.identity if given.kept is None else given.kept
    descriptor.close = given.close
    if nested_hook_runs_on_the_vma(kernel, given):
        _nested(kernel, mapping, given, descriptor)
    mapping.flags, mapping.file = descriptor.flags, descriptor.vm_file
    if given.huge_size:
        mapping.flags |= hugetlb_marks_itself(kernel) or 0


def _nested(kernel: Kernel, mapping: Mapping, given: FileGiven, descriptor: Descriptor) -> None:
    """compat_vma_mmap_prepare: set the VMA from the descriptor that the nested hook has filled."""
    called_file_stays(kernel)
    descriptor.close = given.nested_close
    descriptor.flags |= nested_hook_only_adds_flags(kernel, mapping.flags, descriptor.flags) or 0
    if nested_hook_replaces_ops(kernel, mapping, descriptor):
        mapping.close = descriptor.close
    nested_action_runs_at_once(kernel)


def _secret_memory(kernel: Kernel, mapping: Mapping) -> None:
    if secret_memory_must_be_shared(kernel, mapping.flags):
        kernel.fail("EINVAL")
    if lock_limit_is_reached(kernel, mapping.flags | LOCKED, mapping.end - mapping.start):
        kernel.fail("EAGAIN")
    mapping.flags |= (secret_memory_is_not_dumped(kernel) or 0) | (secret_memory_is_locked(kernel) or 0)
