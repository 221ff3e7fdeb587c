"""System V shared memory and the aio ring: shmat, shmdt, io_setup, io_destroy."""

from __future__ import annotations

from dataclasses import replace

from vmatrace.rules.constants import (
    MAP_FIXED,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    SHM_EXEC,
    SHM_RDONLY,
    SHM_REMAP,
    SHM_RND,
)  # fmt: skip
from vmatrace.rules.context import Kernel
from vmatrace.rules.mmap import do_mmap
from vmatrace.rules.model import FileGiven, Operation
from vmatrace.rules.munmap import unmap_range
from vmatrace.rules.registry import rule
from vmatrace.vma import DONTEXPAND, Vma


def _attach_address(kernel: Kernel, addr: int, flags: int) -> int:
    """do_shmat's tests of the address; 0 where the kernel picks."""
    if not addr:
        if flags & SHM_REMAP:
            kernel.fail("EINVAL")
        return 0
    if not kernel.aligned(addr):
        if not flags & SHM_RND:
            kernel.fail("EINVAL")
        addr &= ~(kernel.limits.page_size - 1)
        if not addr and flags & SHM_REMAP:
            kernel.fail("EINVAL")
    return addr


@rule("shmat_in_the_way", "do_shmat")
def something_is_attached_there(kernel: Kernel, addr: int, size: int, flags: int) -> bool:
    """Without SHM_REMAP nothing may be mapped where the segment goes."""
    return not flags & SHM_REMAP and not kernel.space.is_free(addr, addr + size)


@rule("shmat_fresh_file", "do_shmat", unobservable=True)
def each_attach_has_its_own_file(kernel: Kernel) -> bool:
    """Each attach opens a file of its own (two would not merge anyway: both start at page offset 0)."""
    return True


def shmat(kernel: Kernel, operation: Operation) -> int:
    """shmat(shmid, shmaddr, shmflg); inputs: the segment's ``size``, ``picked`` address, perhaps ``file``.

    With ``size_is_least``, only what does not depend on more can be told.
    """
    args = operation.args
    flags = args.get("shmflg", 0)
    if args.get("shmid", 0) >> 31 & 1:
        kernel.fail("EINVAL")
    addr = _attach_address(kernel, args.get("shmaddr", 0), flags)
    size = operation.inputs.get("size")
    if size is None:
        kernel.cannot_know("the size of the segment is not known")
    if addr and something_is_attached_there(kernel, addr, size, flags):
        kernel.fail("EINVAL")
    if operation.inputs.get("size_is_least"):
        kernel.cannot_know("the size of the segment is not known")
    prot = PROT_READ if flags & SHM_RDONLY else PROT_READ | PROT_WRITE
    prot |= PROT_EXEC if flags & SHM_EXEC else 0
    given: FileGiven = operation.inputs.get("file") or FileGiven(("sysv", kernel.space.fresh()))
    identity = given.identity if each_attach_has_its_own_file(kernel) else "sysv"
    given = replace(given, identity=identity, kind="sysv", close=True, writable=not flags & SHM_RDONLY)
    kernel.inputs = {**kernel.inputs, "file": given}
    return do_mmap(kernel, addr, size, prot, MAP_SHARED | (MAP_FIXED if addr else 0), 0)


@rule("shmdt_fragments", "ksys_shmdt")
def is_fragment(kernel: Kernel, vma: Vma, addr: int) -> bool:
    """shmdt removes each fragment whose place still matches its page offset; foreign VMAs between survive."""
    return vma.kind == "sysv" and (vma.start - addr) >> kernel.shift == vma.pgoff


def shmdt(kernel: Kernel, operation: Operation) -> int:
    """shmdt(shmaddr); input ``size``: the segment's (else the fragments found tell)."""
    addr = operation.args["shmaddr"]
    if not kernel.aligned(addr):
        kernel.fail("EINVAL")
    vma = kernel.space.find(addr)
    while vma is not None and not is_fragment(kernel, vma, addr):
        vma = kernel.space.find(vma.end)
    if vma is None:
        kernel.fail("EINVAL")
    file, size = vma.file, operation.inputs.get("size")
    # The first fragment goes whatever its length; the others only within the segment's size.
    first = True
    while vma is not None and (first or size is None or vma.end - addr <= kernel.align_up(size)):
        if is_fragment(kernel, vma, addr) and vma.file == file:
            unmap_range(kernel, vma.start, vma.end - vma.start)
        vma, first = kernel.space.find(vma.end), False
    return 0


def io_setup(kernel: Kernel, operation: Operation) -> int:
    """io_setup(nr_events, ctxp): a shared ring that cannot grow; inputs ``size``, ``picked``. Returns 0."""
    size = operation.inputs.get("size")
    if size is None:
        kernel.cannot_know("the size of the aio ring is not known")
    prepare = kernel.has("early_ksm_flag")  # the ring file was converted with the file systems
    given: FileGiven = operation.inputs.get("file") or FileGiven(("aio", kernel.space.fresh()))
    kernel.inputs = {
        **kernel.inputs,
        "file": replace(given, kind="aio", prepare=prepare, set_flags=DONTEXPAND),
    }
    do_mmap(kernel, 0, size, PROT_READ | PROT_WRITE, MAP_SHARED, 0)
    return 0


def io_destroy(kernel: Kernel, operation: Operation) -> int:
    """io_destroy(ctx): unmaps the ring, which starts at the context's value."""
    start = operation.args["ctx"]
    vma = kernel.space.at(start)
    if vma is None or vma.kind != "aio":
        kernel.fail("EINVAL")
    unmap_range(kernel, start, operation.inputs.get("size", vma.end - start))
    return 0


CALLS = {"shmat": shmat, "shmdt": shmdt, "io_setup": io_setup, "io_destroy": io_destroy}
