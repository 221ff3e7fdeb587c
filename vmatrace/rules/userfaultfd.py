"""userfaultfd: register, unregister and release change context and mode flags of ranges, and may merge."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from vmatrace.rules.constants import (
    UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
)  # fmt: skip
from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import note_change
from vmatrace.rules.model import Operation
from vmatrace.rules.modify import modify
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    DROPPABLE,
    HUGETLB,
    MAYWRITE,
    UFFD_FLAGS,
    UFFD_MINOR,
    UFFD_MISSING,
    UFFD_WP,
    Vma,
)  # fmt: skip

_SHMEM = ("shmem", "shmem_anon")


@rule("uffd_kinds", "vma_can_userfault")
def cannot_be_watched(kernel: Kernel, vma: Vma, mode: int) -> bool:
    """Only anonymous, shmem and hugetlb memory can be registered, never droppable; MINOR needs shmem or
    hugetlb."""
    if vma.flags & DROPPABLE and kernel.has("uffd_not_droppable"):
        return True
    shared_kind = bool(vma.flags & HUGETLB) or vma.kind in _SHMEM
    if mode & UFFD_MINOR and not shared_kind:
        return True
    if kernel.inputs.get("wp_async") and mode == UFFD_WP:
        return False
    return not (vma.anonymous or shared_kind)


@rule("uffd_needs_maywrite", "userfaultfd_register")
def is_read_only_for_ever(kernel: Kernel, vma: Vma) -> bool:
    """A mapping without MAYWRITE cannot be registered."""
    return not vma.flags & MAYWRITE


@rule("uffd_one_owner", "userfaultfd_register, userfaultfd_unregister")
def belongs_to_another(kernel: Kernel, vma: Vma, context: Hashable) -> bool:
    """A VMA belongs to one userfaultfd at a time."""
    return vma.uffd is not None and vma.uffd != context


@rule("uffd_modes_kept", "userfaultfd_register", feature="uffd_modes_kept")
def would_drop_a_mode(kernel: Kernel, vma: Vma, mode: int) -> int:
    """Registering a range again may not drop write-protect tracking, whose marks it would leave behind."""
    return vma.flags & UFFD_WP & ~mode


@rule("uffd_already_there", "userfaultfd_register_range")
def is_registered_so(kernel: Kernel, vma: Vma, context: Hashable, mode: int) -> bool:
    """A VMA that is registered with this context and mode already is passed over."""
    return vma.uffd == context and vma.flags & mode == mode


def _range(kernel: Kernel, operation: Operation) -> tuple[int, int, list[Vma]]:
    """validate_range, and the VMAs of the range (EINVAL where there is none)."""
    start, length = operation.args["start"], operation.args["len"]
    limits = kernel.limits
    wrong = not kernel.aligned(start) or not kernel.aligned(length) or not length or start < limits.mmap_min_addr
    if wrong or length > limits.task_size - start:
        kernel.fail("EINVAL")
    found = kernel.space.overlapping(start, start + length)
    if not found:
        kernel.fail("EINVAL")
    return start, start + length, found


def register(kernel: Kernel, operation: Operation) -> int:
    """UFFDIO_REGISTER: ``start``, ``len``, ``mode``; input ``uffd``, the context."""
    wanted = operation.args["mode"]
    mode = (
        (UFFD_MISSING if wanted & UFFDIO_REGISTER_MODE_MISSING else 0)
        | (UFFD_WP if wanted & UFFDIO_REGISTER_MODE_WP else 0)
        | (UFFD_MINOR if wanted & UFFDIO_REGISTER_MODE_MINOR else 0)
    )
    if not mode or wanted & ~7:
        kernel.fail("EINVAL")
    context: Hashable = operation.inputs.get("uffd", "uffd")
    start, end, found = _range(kernel, operation)
    for vma in found:
        if cannot_be_watched(kernel, vma, mode):
            kernel.fail("EINVAL")
        if is_read_only_for_ever(kernel, vma):
            kernel.fail("EPERM")
        if vma.huge_size and end < vma.end and end % vma.huge_size:
            kernel.fail("EINVAL")
        if belongs_to_another(kernel, vma, context) or would_drop_a_mode(kernel, vma, mode):
            kernel.fail("EBUSY")
    if found[0].huge_size and start % found[0].huge_size:
        kernel.fail("EINVAL")
    for low, stop, vma, prev in _parts(kernel, start, end):
        if not is_registered_so(kernel, vma, context, mode):
            flags = vma.flags & ~UFFD_FLAGS | mode
            _set_context(kernel, modify(kernel, vma, prev, low, stop, flags=flags, uffd=context)[0], context, mode)
    return 0


def _parts(kernel: Kernel, start: int, end: int) -> Iterator[tuple[int, int, Vma, Vma | None]]:
    """Each VMA's part of the range in turn, looked up anew after what was done to the one before."""
    while start < end:
        vma = kernel.space.find(start)
        if vma is None or vma.start >= end:
            return
        start = max(start, vma.start)
        yield start, min(vma.end, end), vma, kernel.space.below(start)
        changed = kernel.space.at(start)
        start = changed.end if changed is not None else end


def _set_context(kernel: Kernel, vma: Vma, context: Hashable, mode: int) -> None:
    """userfaultfd_set_ctx: the survivor keeps its other flags."""
    flags = vma.flags & ~UFFD_FLAGS | mode
    if vma.flags != flags or vma.uffd != context:
        note_change(kernel, vma, "uffd")
        kernel.put(vma, vma._replace(flags=flags, uffd=context))


def _clear(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int) -> None:
    """userfaultfd_clear_vma: a whole VMA gives up quietly where memory is short."""
    whole = start == vma.start and end == vma.end
    flags = vma.flags & ~UFFD_FLAGS
    changed, _ = modify(kernel, vma, prev, start, end, flags=flags, uffd=None, give_up_on_oom=whole)
    _set_context(kernel, changed, None, 0)


def unregister(kernel: Kernel, operation: Operation) -> int:
    """UFFDIO_UNREGISTER: ``start``, ``len``; input ``uffd``."""
    context: Hashable = operation.inputs.get("uffd", "uffd")
    start, end, found = _range(kernel, operation)
    for vma in found:
        if cannot_be_watched(kernel, vma, vma.flags & UFFD_FLAGS):
            kernel.fail("EINVAL")
        if belongs_to_another(kernel, vma, context):
            kernel.fail("EINVAL")
    for low, stop, vma, prev in _parts(kernel, start, end):
        if vma.uffd is not None:
            _clear(kernel, vma, prev, low, stop)
    return 0


def release(kernel: Kernel, operation: Operation) -> int:
    """The last close of a userfaultfd: every VMA of its context is cleared."""
    context: Hashable = operation.inputs.get("uffd", "uffd")
    vma = kernel.space.find(0)
    while vma is not None:
        end = vma.end
        if vma.uffd == context:
            _clear(kernel, vma, kernel.space.below(vma.start), vma.start, vma.end)
        vma = kernel.space.find(end)
    return 0


CALLS = {"uffd_register": register, "uffd_unregister": unregister, "uffd_release": release}
