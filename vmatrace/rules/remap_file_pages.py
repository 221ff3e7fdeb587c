"""remap_file_pages: since v4.0 a fixed shared mmap of the same file over part of it."""

from __future__ import annotations

from dataclasses import replace

from vmatrace.rules.constants import MAP_FIXED, MAP_LOCKED, MAP_SHARED
from vmatrace.rules.context import Kernel
from vmatrace.rules.mmap import do_mmap
from vmatrace.rules.model import FileGiven, Operation
from vmatrace.vma import LOCKED, MAYEXEC, MAYWRITE, SHARED, SPECIAL, Vma


def _attached_elsewhere(kernel: Kernel, vma: Vma, start: int, end: int) -> bool:
    """Whether the segment stays attached here when ``[start, end)`` is unmapped."""
    same = (other for other in kernel.space if other.file == vma.file)
    return any(other.start < start or end < other.end for other in same)


def remap_file_pages(kernel: Kernel, operation: Operation) -> int:
    """remap_file_pages(start, size, prot, pgoff, flags): since v4.0 a fixed shared mmap of the same file."""
    args = operation.args
    mask = ~(kernel.limits.page_size - 1)
    start, size, pgoff = args["start"] & mask, args["size"] & mask, args.get("pgoff", 0)
    if args.get("prot", 0) or not size or pgoff + (size >> kernel.shift) >= 1 << 64:
        kernel.fail("EINVAL")
    vma = kernel.space.at(start)
    if vma is None or not vma.flags & SHARED:
        kernel.fail("EINVAL")
    end = vma.end
    for other in kernel.space.overlapping(vma.end, start + size):
        if other.start != end or other.file != vma.file or other.flags != vma.flags:
            kernel.fail("EINVAL")
        end = other.end
    if start + size > end:
        kernel.fail("EINVAL")
    if vma.kind == "sysv" and not _attached_elsewhere(kernel, vma, start, start + size):
        kernel.cannot_know("whether the segment dies with its last attach is not in the trace")
    # MAP_NONBLOCK, the one flag that counts, only keeps pages from being populated.
    flags = MAP_SHARED | MAP_FIXED
    if vma.flags & LOCKED:
        flags |= MAP_LOCKED
    given: FileGiven = kernel.inputs.get("file") or FileGiven(vma.file)
    # SHARED says that the file was opened for writing; without MAYWRITE it is sealed.
    given = replace(
        given, identity=vma.file, kind=vma.kind, close=vma.close, writable=True,
        write_sealed=not vma.flags & MAYWRITE, noexec=not vma.flags & MAYEXEC,
        # The driver maps as it did before.
        set_flags=given.set_flags | vma.flags & SPECIAL,
    )  # fmt: skip
    kernel.inputs = {**kernel.inputs, "file": given}
    do_mmap(kernel, start, size, vma.flags & 7, flags, pgoff)
    return 0


CALLS = {"remap_file_pages": remap_file_pages}
