"""The outer half of mmap: do_mmap - arguments to flags, the address, and every test before __mmap_region."""

from __future__ import annotations

from vmatrace.rules.accounting import lock_limit_is_reached, may_expand, new_map_is_one_too_many
from vmatrace.rules.constants import (
    MAP_32BIT,
    MAP_ABOVE4G,
    MAP_ANONYMOUS,
    MAP_DROPPABLE,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_STACK,
    MAP_SYNC,
    MAP_TYPE,
    PROT_BTI,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
)  # fmt: skip
from vmatrace.rules.context import Kernel
from vmatrace.rules.hooks import Mapping, file_has_two_hooks, secret_memory_must_be_shared
from vmatrace.rules.mmap_region import map_region
from vmatrace.rules.model import FileGiven, ImpossibleInput, Operation
from vmatrace.rules.registry import rule
from vmatrace.vma import (
    ARCH_1,
    DONTDUMP,
    DROPPABLE,
    EXEC,
    GROWSDOWN,
    LOCKED,
    MAY_ALL,
    MAYEXEC,
    MAYSHARE,
    MAYWRITE,
    NOHUGEPAGE,
    NORESERVE,
    PKEY_SHIFT,
    SHADOW_STACK,
    SHARED,
    SYNC,
    WIPEONFORK,
    WRITE,
)  # fmt: skip

# The flags that every file accepts with MAP_SHARED_VALIDATE (LEGACY_MAP_MASK).
_LEGACY = (
    MAP_SHARED | MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | 0x800 | 0x1000 | 0x4000000 | MAP_32BIT |
    MAP_GROWSDOWN
    | MAP_LOCKED | MAP_NORESERVE | 0x8000 | 0x10000 | MAP_STACK | MAP_HUGETLB | (0x1F << 26)
)  # fmt: skip


@rule("read_implies_exec", "do_mmap, do_mprotect_pkey")
def read_implies_exec(kernel: Kernel, prot: int, allowed: bool) -> int:
    """With the READ_IMPLIES_EXEC personality PROT_READ brings PROT_EXEC where the VMA may have it."""
    return PROT_EXEC if kernel.limits.read_implies_exec and prot & PROT_READ and allowed else 0


@rule("stack_no_hugepage", "calc_vm_flag_bits", feature="map_stack_nohuge")
def stack_flag_forbids_huge_pages(kernel: Kernel, flags: int) -> int:
    """MAP_STACK sets NOHUGEPAGE where the kernel has transparent huge pages."""
    return NOHUGEPAGE if flags & MAP_STACK and kernel.limits.config.thp else 0


@rule("noreserve_honoured", "do_mmap")
def noreserve_is_honoured(kernel: Kernel, flags: int, hugetlb: bool) -> int:
    """MAP_NORESERVE sets NORESERVE unless overcommit is forbidden (mode 2); hugetlb honours it always."""
    honoured = flags & MAP_NORESERVE and (kernel.limits.overcommit_memory != 2 or hugetlb)
    return NORESERVE if honoured else 0


@rule("execute_only_pkey", "execute_only_pkey")
def execute_only_takes_a_key(kernel: Kernel, prot: int) -> int:
    """PROT_EXEC alone takes the execute-only protection key where the CPU has keys."""
    return kernel.inputs.get("execute_pkey") or 0 if kernel.limits.config.pkeys and prot == PROT_EXEC else 0


@rule("future_lock", "do_mmap (mm->def_flags)")
def mm_default_flags(kernel: Kernel) -> int:
    """mlockall(MCL_FUTURE) gives each new mapping LOCKED (and LOCKONFAULT)."""
    return kernel.mm.def_flags


@rule("droppable", "do_mmap", feature="droppable")
def droppable_flags(kernel: Kernel) -> int:
    """MAP_DROPPABLE: DROPPABLE, not reserved, wiped on fork, not dumped."""
    return DROPPABLE | NORESERVE | WIPEONFORK | DONTDUMP


@rule("deny_write_exec", "map_deny_write_exec")
def write_exec_is_denied(kernel: Kernel, old: int, new: int) -> bool:
    """After PR_SET_MDWE nothing may be writable and executable, nor become executable."""
    return kernel.mm.mdwe and bool(new & EXEC) and (bool(new & WRITE) or not old & EXEC)


@rule("hint_honoured", "arch_get_unmapped_area_topdown")
def free_hint_is_honoured(kernel: Kernel, hint: int, length: int) -> int:
    """A hint with free room (and guard gap above) is where an anonymous mapping goes."""
    page = kernel.limits.page_size
    hint &= ~(page - 1)
    floor = kernel.align_up(kernel.limits.mmap_min_addr)
    hint = max(hint, floor) if hint else 0
    if not hint or hint + length > kernel.limits.task_size:
        return 0
    next = kernel.space.find(hint)
    if next is None:
        return hint
    gap = 0
    if next.flags & GROWSDOWN:
        gap = kernel.limits.stack_guard_gap * page
    elif next.flags & SHADOW_STACK:
        gap = page
    return hint if hint + length <= max(next.start - gap, 0) else 0


@rule("noreplace_refuses", "do_mmap")
def something_is_in_the_way(kernel: Kernel, start: int, length: int) -> bool:
    """MAP_FIXED_NOREPLACE fails where any VMA overlaps."""
    return not kernel.space.is_free(start, start + length)


def prot_flags(kernel: Kernel, prot: int, pkey: int) -> int:
    """calc_vm_prot_bits: READ, WRITE, EXEC and the protection key."""
    return prot & 7 | pkey << PKEY_SHIFT


@rule("bti_marks", "arch_calc_vm_prot_bits, arch_validate_prot (arm64)")
def branch_targets_are_guarded(kernel: Kernel, prot: int) -> int:
    """PROT_BTI sets ARCH_1 (VM_ARM64_BTI) where an arm64 CPU has it; elsewhere mmap ignores and mprotect refuses it."""
    known = kernel.limits.config.bti
    if not prot & PROT_BTI or known is False:
        return 0
    if known is None and not kernel.mm.bti:
        # exec maps the program and its loader with BTI where both the CPU and they have it.
        kernel.mm.bti = any(vma.flags & ARCH_1 for vma in kernel.space)
        if not kernel.mm.bti:
            kernel.cannot_know("whether the CPU has BTI is not known")
    return ARCH_1


def do_mmap(kernel: Kernel, addr: int, length: int, prot: int, flags: int, pgoff: int, extra: int = 0) -> int:
    """do_mmap: the address of the mapping. ``extra``: vm_flags the caller adds (shadow stacks)."""
    given: FileGiven | None = kernel.inputs.get("file")
    if length == 0:
        kernel.fail("EINVAL")
    prot |= read_implies_exec(kernel, prot, given is None or not given.noexec) or 0
    if flags & MAP_FIXED_NOREPLACE:
        flags |= MAP_FIXED
    length = kernel.align_up(length)
    if length >= 1 << 64:
        kernel.fail("ENOMEM")
    if pgoff + (length >> kernel.shift) >= 1 << 64:
        kernel.fail("EOVERFLOW")
    if new_map_is_one_too_many(kernel):
        kernel.fail("ENOMEM")
    vm_flags = extra | prot_flags(kernel, prot, execute_only_takes_a_key(kernel, prot) or 0)
    vm_flags |= branch_targets_are_guarded(kernel, prot) or 0
    vm_flags |= _flag_bits(kernel, flags) | (mm_default_flags(kernel) or 0) | MAY_ALL
    start = _fixed_address(kernel, addr, length, flags)
    if flags & MAP_LOCKED and not kernel.limits.can_lock and kernel.limits.rlimit_memlock == 0:
        kernel.fail("EPERM")
    if lock_limit_is_reached(kernel, vm_flags, length):
        kernel.fail("EAGAIN")
    if given is not None:
        if offset_is_past_any_file(kernel, given, length, pgoff):
            kernel.fail("EOVERFLOW")
        vm_flags = _file_flags(kernel, given, prot, flags, vm_flags)
    else:
        vm_flags = _anonymous_flags(kernel, flags, vm_flags)
    hugetlb = given is not None and bool(given.huge_size)
    vm_flags |= noreserve_is_honoured(kernel, flags, hugetlb) or 0
    if write_exec_is_denied(kernel, vm_flags, vm_flags):
        kernel.fail("EACCES")
    if start is None:
        if not may_expand(kernel, vm_flags, length >> kernel.shift):
            kernel.fail("ENOMEM")
        start = _picked_address(kernel, addr, length, flags, given, vm_flags)
    if given is None:
        pgoff = 0 if vm_flags & SHARED else start >> kernel.shift
    map_region(kernel, _mapping(kernel, given, start, length, vm_flags, pgoff))
    return start


def _flag_bits(kernel: Kernel, flags: int) -> int:
    """calc_vm_flag_bits."""
    bits = stack_flag_forbids_huge_pages(kernel, flags) or 0
    if flags & MAP_GROWSDOWN:
        bits |= GROWSDOWN
    if flags & MAP_LOCKED:
        bits |= LOCKED
    if flags & MAP_SYNC:
        bits |= SYNC
    return bits


def _fixed_address(kernel: Kernel, addr: int, length: int, flags: int) -> int | None:
    """The address where MAP_FIXED names it, tested; None where the kernel picks."""
    if length > kernel.limits.task_size:
        kernel.fail("ENOMEM")
    if not flags & MAP_FIXED:
        return None
    if addr > kernel.limits.task_size - length:
        kernel.fail("ENOMEM")
    if not kernel.aligned(addr):
        kernel.fail("EINVAL")
    if flags & MAP_FIXED_NOREPLACE and something_is_in_the_way(kernel, addr, length):
        kernel.fail("EEXIST")
    return addr


def _picked_address(
    kernel: Kernel, addr: int, length: int, flags: int, given: FileGiven | None, vm_flags: int
) -> int:
    """Where the kernel put it: a free hint of an anonymous map, else the input, tested."""
    picked: int | None = kernel.inputs.get("picked")
    if given is None and not flags & MAP_32BIT:
        hinted = free_hint_is_honoured(kernel, addr, length)
        if hinted:
            return hinted
    # A call that failed tells no address; what the hook refuses needs none.
    secret = picked is None and given is not None and given.kind == "secretmem"
    if secret and secret_memory_must_be_shared(kernel, vm_flags):
        kernel.fail("EINVAL")
    return check_picked(kernel, picked, length)


def check_picked(kernel: Kernel, picked: int | None, length: int) -> int:
    """The address that the kernel chose, as given; ImpossibleInput where no kernel could have chosen it."""
    if picked is None:
        kernel.cannot_know("the address that the kernel picked is not known")
    if not kernel.aligned(picked) or picked + length > max(kernel.limits.task_size, 1 << 56):
        raise ImpossibleInput(f"picked address {picked:#x} is misaligned or out of range")
    if not kernel.space.is_free(picked, picked + length):
        raise ImpossibleInput(f"picked address {picked:#x} is not free")
    return picked


@rule("offset_past_any_file", "file_mmap_ok")
def offset_is_past_any_file(kernel: Kernel, given: FileGiven, length: int, pgoff: int) -> bool:
    """A file can be mapped up to its largest possible size: 2**63 for a regular one, 2**64 for a driver's."""
    largest = (1 << 63) - 1 if given.regular else (1 << 64) - 1
    return pgoff > largest - length >> kernel.shift


def _file_flags(kernel: Kernel, given: FileGiven, prot: int, flags: int, vm_flags: int) -> int:
    """The file half of do_mmap: access mode, noexec mounts, seals."""
    kind = flags & MAP_TYPE
    if kind == MAP_SHARED:
        flags &= _LEGACY
    elif kind == MAP_SHARED_VALIDATE:
        if flags & MAP_ABOVE4G:
            kernel.cannot_know("whether this kernel has MAP_ABOVE4G")
        if flags & ~(_LEGACY | (MAP_SYNC if given.sync else 0)):
            kernel.fail("EOPNOTSUPP")
    elif kind != MAP_PRIVATE:
        kernel.fail("EINVAL")
    if kind != MAP_PRIVATE:
        if prot & PROT_WRITE and not given.writable:
            kernel.fail("EACCES")
        vm_flags |= SHARED | MAYSHARE
        vm_flags &= ~(read_only_file_stays_so(kernel, given) or 0)
    if not given.readable:
        kernel.fail("EACCES")
    if given.noexec:
        if vm_flags & EXEC:
            kernel.fail("EPERM")
        vm_flags &= ~(noexec_mount_stays_so(kernel) or 0)
    if not given.can_map or file_has_two_hooks(kernel, given):
        kernel.fail("ENODEV")
    if vm_flags & GROWSDOWN:
        kernel.fail("EINVAL")
    if sealed_against_writing(kernel, given, vm_flags):
        if vm_flags & WRITE:
            kernel.fail("EPERM")
        vm_flags &= ~MAYWRITE
    return vm_flags


@rule("readonly_file_no_maywrite", "do_mmap")
def read_only_file_stays_so(kernel: Kernel, given: FileGiven) -> int:
    """A shared map of a file opened for reading only loses SHARED and MAYWRITE; MAYSHARE stays."""
    return 0 if given.writable else MAYWRITE | SHARED


@rule("noexec_no_mayexec", "do_mmap")
def noexec_mount_stays_so(kernel: Kernel) -> int:
    """A file on a noexec mount has no MAYEXEC."""
    return MAYEXEC


@rule("write_seal", "memfd_check_seals_mmap")
def sealed_against_writing(kernel: Kernel, given: FileGiven, flags: int) -> bool:
    """A shared map of a write-sealed memfd is refused if writable, else it loses MAYWRITE."""
    return given.write_sealed and bool(flags & SHARED)


def _anonymous_flags(kernel: Kernel, flags: int, vm_flags: int) -> int:
    kind = flags & MAP_TYPE
    if kind == MAP_PRIVATE:
        return vm_flags
    if kind == MAP_SHARED:
        if vm_flags & GROWSDOWN:
            kernel.fail("EINVAL")
        return vm_flags | SHARED | MAYSHARE
    if kind == MAP_DROPPABLE:
        dropped = droppable_flags(kernel)
        if not dropped or flags & (MAP_LOCKED | MAP_HUGETLB) or vm_flags & GROWSDOWN:
            kernel.fail("EINVAL")
        return vm_flags | dropped
    kernel.fail("EINVAL")


def _mapping(kernel: Kernel, given: FileGiven | None, start: int, length: int, flags: int, pgoff: int) -> Mapping:
    mapping = Mapping(start, start + length, flags, pgoff, given)
    if given is not None:
        mapping.file = given.identity
        mapping.kind = given.kind
        mapping.anonymous = given.anonymous
        mapping.close = given.close
        mapping.huge_size = given.huge_size
    return mapping


def mmap(kernel: Kernel, operation: Operation) -> int:
    """mmap(addr, len, prot, flags, fd, off): ``off`` in bytes; the file, if any, is an input."""
    args = operation.args
    flags, length = args.get("flags", 0), args["len"]
    offset = args.get("off", 0)
    if not kernel.aligned(offset):
        kernel.fail("EINVAL")
    given = kernel.inputs.get("file")
    if given is None and not flags & MAP_ANONYMOUS:
        kernel.fail("EBADF")
    if given is not None and given.huge_size:
        length = -(-length // given.huge_size) * given.huge_size
    elif flags & MAP_HUGETLB:
        if not flags & MAP_ANONYMOUS:
            kernel.fail("EINVAL")
        kernel.cannot_know("the huge pages of a MAP_HUGETLB mapping are not known")
    return do_mmap(kernel, args.get("addr", 0), length, args["prot"], flags, offset >> kernel.shift)


def map_shadow_stack(kernel: Kernel, operation: Operation) -> int:
    """map_shadow_stack(addr, size, flags): a writable shadow stack, mapped read-only for the program."""
    args = operation.args
    addr, flags = args.get("addr", 0), MAP_ANONYMOUS | MAP_PRIVATE
    if args.get("flags", 0) & ~3:
        kernel.fail("EINVAL")
    if addr:
        flags |= MAP_FIXED_NOREPLACE
    return do_mmap(kernel, addr, args["size"], PROT_READ, flags, 0, SHADOW_STACK | WRITE)


CALLS = {"mmap": mmap, "map_shadow_stack": map_shadow_stack}
