"""The life of a vm_area_struct: allocated, duplicated, attached, detached, freed - and who may do which.

No rule here changes a layout: they say which orders of events a trace may show for one object.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmatrace.kernel import Commit
from vmatrace.rules.context import Kernel
from vmatrace.rules.registry import rule


@dataclass(slots=True)
class VmaObject:
    """One ``vm_area_struct``: its generation (how often its memory was reused), and vm_refcnt.

    ``refcnt`` is 0 while detached, 1 while attached, more while readers hold it.
    """

    generation: int = 0
    refcnt: int = 0
    freed: bool = False

    @property
    def attached(self) -> bool:
        """In the tree."""
        return self.refcnt > 0


@rule(
    "object_in_mm",
    "vm_area_alloc, vm_area_dup, vm_area_free",
    feature="vma_alloc_in_mm",
    commit=Commit("3e43e260f1e4", "mm: perform VMA allocation, freeing, duplication in mm", "v6.16"),
    unobservable=True,
)
def objects_are_made_in_mm(kernel: Kernel) -> bool:
    """Objects are made and freed by mm/vma_init.c; before, by kernel/fork.c. Behaviour is the same."""
    return True


@rule("object_born_detached", "vm_area_alloc, vm_area_dup", feature="vm_refcnt", unobservable=True)
def object_starts_detached(kernel: Kernel, made: VmaObject) -> bool:
    """A new or duplicated object is detached; a duplicate does not copy the count."""
    made.refcnt, made.freed = 0, False
    return True


@rule("object_attached_once", "vma_mark_attached", feature="vm_refcnt", unobservable=True)
def object_is_attached_already(kernel: Kernel, obj: VmaObject) -> bool:
    """Attach comes after the store in the tree, and once."""
    return obj.attached or obj.freed


@rule("object_detached_before_free", "vma_assert_detached, vm_area_free", feature="vm_refcnt", unobservable=True)
def object_is_still_attached(kernel: Kernel, obj: VmaObject) -> bool:
    """An object is detached before it is freed: by munmap's gather, by a merge, by exit_mmap."""
    return obj.attached


@rule(
    "object_reused_at_once",
    "vma_cache (SLAB_TYPESAFE_BY_RCU)",
    feature="vma_typesafe",
    commit=Commit("3104138517fc", "mm: make vma cache SLAB_TYPESAFE_BY_RCU", "v6.15"),
    unobservable=True,
)
def object_is_reused_at_once(kernel: Kernel, obj: VmaObject) -> bool:
    """Freed memory becomes another VMA at once, so a pointer needs a generation to name an object."""
    return obj.freed


def allocate(kernel: Kernel, freed: VmaObject | None = None) -> VmaObject:
    """vm_area_alloc or vm_area_dup: a new object, perhaps in the memory of a freed one."""
    objects_are_made_in_mm(kernel)
    made = VmaObject()
    if freed is not None and object_is_reused_at_once(kernel, freed):
        made.generation = freed.generation + 1
    object_starts_detached(kernel, made)
    return made


def attach(kernel: Kernel, obj: VmaObject) -> None:
    """vma_mark_attached. Raises ValueError where the kernel would warn."""
    if object_is_attached_already(kernel, obj):
        raise ValueError("attached twice or after free")
    obj.refcnt = 1


def detach(kernel: Kernel, obj: VmaObject) -> None:
    """vma_mark_detached. Raises ValueError where the kernel would warn."""
    if not obj.attached:
        raise ValueError("detached twice")
    obj.refcnt = 0


def free(kernel: Kernel, obj: VmaObject) -> None:
    """vm_area_free. Raises ValueError where the kernel would warn."""
    if object_is_still_attached(kernel, obj) or obj.freed:
        raise ValueError("freed while attached, or twice")
    obj.freed = True
