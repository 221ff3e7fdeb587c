"""The mm's counters, and the limits on address space and map count: vm_stat_account, may_expand_vm."""

from __future__ import annotations

from vmatrace.rules.context import Kernel
from vmatrace.rules.model import MmState
from vmatrace.rules.registry import rule
from vmatrace.vma import EXEC, GROWSDOWN, LOCKED, SHADOW_STACK, SHARED, WRITE, AddressSpace, Vma


def is_data(flags: int) -> bool:
    """is_data_mapping: private and writable, not a stack."""
    return flags & (WRITE | SHARED | GROWSDOWN) == WRITE


def is_stack(flags: int) -> bool:
    """is_stack_mapping: grows down, or a shadow stack."""
    return bool(flags & (GROWSDOWN | SHADOW_STACK))


def is_exec(flags: int) -> bool:
    """is_exec_mapping: executable, neither writable nor a stack."""
    return flags & (EXEC | WRITE | GROWSDOWN) == EXEC


def stat_account(mm: MmState, flags: int, pages: int) -> None:
    """vm_stat_account: add ``pages`` (may be negative) to total_vm and to the class that ``flags`` belong
    to."""
    mm.total_vm += pages
    if is_exec(flags):
        mm.exec_vm += pages
    elif is_stack(flags):
        mm.stack_vm += pages
    elif is_data(flags):
        mm.data_vm += pages


def account(mm: MmState, vma: Vma, pages: int) -> None:
    """Count pages of a VMA in every counter, locked_vm included."""
    stat_account(mm, vma.flags, pages)
    if vma.flags & LOCKED:
        mm.locked_vm += pages


def counters_of(space: AddressSpace, page_size: int = 4096) -> MmState:
    """The mm's counters as its VMAs alone give them (a kernel that loses count is not seen here)."""
    mm = MmState(map_count=len(space))
    for vma in space:
        account(mm, vma, (vma.end - vma.start) // page_size)
    return mm


@rule("rlimit_as", "may_expand_vm")
def address_space_is_full(kernel: Kernel, pages: int) -> bool:
    """total_vm may not pass RLIMIT_AS."""
    return kernel.mm.total_vm + pages > kernel.limits.rlimit_as >> kernel.shift


@rule("rlimit_data", "may_expand_vm")
def data_is_full(kernel: Kernel, flags: int, pages: int) -> bool:
    """data_vm may not pass RLIMIT_DATA; where the soft limit is 0 the hard one binds."""
    limits = kernel.limits
    return is_data(flags) and kernel.mm.data_vm + pages > (limits.rlimit_data or limits.rlimit_data_max) >> kernel.shift


def may_expand(kernel: Kernel, flags: int, pages: int) -> bool:
    """may_expand_vm: both limits hold after ``pages`` more."""
    return not (address_space_is_full(kernel, pages) or data_is_full(kernel, flags, pages))


@rule("overcommit", "security_vm_enough_memory_mm")
def charge_is_refused(kernel: Kernel) -> bool:
    """The charge of accountable memory can be refused by the overcommit mode: an input."""
    return kernel.inputs.get("overcommit_ok", True) is False


@rule("memlock_limit", "mlock_future_ok")
def lock_limit_is_reached(kernel: Kernel, flags: int, length: int) -> bool:
    """A locked mapping may not grow past RLIMIT_MEMLOCK without CAP_IPC_LOCK."""
    limits = kernel.limits
    if not flags & LOCKED or limits.can_lock:
        return False
    return kernel.mm.locked_vm + (length >> kernel.shift) > limits.rlimit_memlock >> kernel.shift


@rule("map_count_new", "do_mmap, do_brk_flags")
def new_map_is_one_too_many(kernel: Kernel) -> bool:
    """A new mapping is refused once the count is above max_map_count (so it may reach the limit plus one)."""
    return kernel.mm.map_count > kernel.limits.max_map_count


@rule("map_count_split", "split_vma")
def split_is_one_too_many(kernel: Kernel) -> bool:
    """A split for a changed range is refused once the count has reached max_map_count."""
    return kernel.mm.map_count >= kernel.limits.max_map_count
