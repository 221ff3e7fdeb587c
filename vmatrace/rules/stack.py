"""Stack growth: expand_downwards lowers a GROWSDOWN VMA to a faulting address, within limits; it never
merges."""

from __future__ import annotations

from vmatrace.rules.accounting import charge_is_refused, lock_limit_is_reached, may_expand
from vmatrace.rules.anon_vma import prepare_anon_vma
from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import tree_is_out_of_memory
from vmatrace.rules.model import Grow, Operation
from vmatrace.rules.registry import rule
from vmatrace.rules.steps import count_growth
from vmatrace.vma import ACCESS, GROWSDOWN, Vma


@rule("stack_guard_gap", "expand_downwards")
def neighbour_is_too_near(kernel: Kernel, vma: Vma, address: int) -> bool:
    """The stack keeps stack_guard_gap from an accessible VMA below that does not grow down itself."""
    prev = kernel.space.below(vma.start)
    if prev is None or prev.flags & GROWSDOWN or not prev.flags & ACCESS:
        return False
    return address - prev.end < kernel.limits.stack_guard_gap * kernel.limits.page_size


@rule("rlimit_stack", "acct_stack_growth")
def stack_is_full(kernel: Kernel, size: int) -> bool:
    """The whole stack VMA stays within RLIMIT_STACK."""
    return size > kernel.limits.rlimit_stack


@rule("growth_needs_anon_vma", "expand_downwards (anon_vma_prepare)")
def growth_needs_anon_vma(kernel: Kernel, vma: Vma) -> bool:
    """A stack gets its anon_vma before it grows, even if the growth is then refused."""
    return vma.anon_vma is None


def expand_stack(kernel: Kernel, operation: Operation) -> int:
    """A fault at ``address`` below a VMA that grows down. Fails where the kernel would send SIGSEGV."""
    address = operation.args["address"] & ~(kernel.limits.page_size - 1)
    vma = kernel.space.find(address)
    if vma is None or not vma.flags & GROWSDOWN:
        kernel.fail("EFAULT")
    if vma.start <= address:
        return 0
    if address < kernel.limits.mmap_min_addr:
        kernel.fail("EPERM")
    if neighbour_is_too_near(kernel, vma, address):
        kernel.fail("ENOMEM")
    if tree_is_out_of_memory(kernel):
        kernel.fail("ENOMEM")
    if growth_needs_anon_vma(kernel, vma):
        vma = prepare_anon_vma(kernel, vma)
    pages = (vma.start - address) >> kernel.shift
    refused = (
        pages > vma.pgoff
        or not may_expand(kernel, vma.flags, pages)
        or stack_is_full(kernel, vma.end - address)
        or lock_limit_is_reached(kernel, vma.flags, vma.start - address)
        or charge_is_refused(kernel)
    )
    if refused:
        kernel.fail("ENOMEM")
    anon_pgoff = None if vma.anon_pgoff is None else vma.anon_pgoff - pages
    grown = kernel.put(vma, vma._replace(start=address, pgoff=vma.pgoff - pages, anon_pgoff=anon_pgoff))
    count_growth(kernel, grown.flags, pages)
    kernel.effects.append(Grow(grown.obj, grown.start, grown.end))
    return 0


CALLS = {"expand_stack": expand_stack}
