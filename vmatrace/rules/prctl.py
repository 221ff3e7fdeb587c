"""prctl as far as it touches VMAs: names, the KSM opt-in of a process, MDWE, the break."""

from __future__ import annotations

from vmatrace.rules.context import Kernel
from vmatrace.rules.ksm import fits_ksm
from vmatrace.rules.madvise import set_name
from vmatrace.rules.merge import note_change
from vmatrace.rules.model import Operation
from vmatrace.rules.registry import rule
from vmatrace.vma import MERGEABLE

PR_SET_VMA = 0x53564D41
PR_SET_MDWE = 65
PR_SET_MEMORY_MERGE = 67


@rule("ksm_marks_all", "ksm_enable_merge_any, ksm_add_vmas", feature="ksm_opt_in")
def every_fit_vma_is_marked(kernel: Kernel) -> bool:
    """PR_SET_MEMORY_MERGE marks every fit VMA MERGEABLE at once, without any merge."""
    return not kernel.mm.ksm


@rule("ksm_unmarks_all", "ksm_disable_merge_any, ksm_del_vmas", feature="ksm_opt_in")
def every_vma_is_unmarked(kernel: Kernel) -> bool:
    """Taking the opt-in back clears MERGEABLE everywhere, without any merge."""
    return kernel.mm.ksm


def _set_memory_merge(kernel: Kernel, on: int) -> None:
    if not kernel.has("ksm_opt_in") or not kernel.limits.config.ksm:
        kernel.fail("EINVAL")
    if on and every_fit_vma_is_marked(kernel):
        for vma in list(kernel.space):
            if not vma.flags & MERGEABLE and fits_ksm(vma.flags, vma.kind):
                note_change(kernel, vma, "flags")
                kernel.put(vma, vma.with_flags(vma.flags | MERGEABLE))
    elif not on and every_vma_is_unmarked(kernel):
        for vma in list(kernel.space):
            if vma.flags & MERGEABLE:
                note_change(kernel, vma, "flags")
                kernel.put(vma, vma.with_flags(vma.flags & ~MERGEABLE))
    kernel.mm.ksm = bool(on)


def prctl(kernel: Kernel, operation: Operation) -> int:
    """prctl(option, arg2, ...): options that touch no VMA do nothing here."""
    args = operation.args
    option = args["option"]
    if option == PR_SET_VMA:
        if args.get("arg2", 0) != 0:
            kernel.fail("EINVAL")
        return set_name(kernel, args["arg3"], args["arg4"], operation.inputs.get("name"))
    if option == PR_SET_MEMORY_MERGE:
        if args.get("arg3", 0) or args.get("arg4", 0) or args.get("arg5", 0):
            kernel.fail("EINVAL")
        _set_memory_merge(kernel, args.get("arg2", 0))
    elif option == PR_SET_MDWE and args.get("arg2", 0) & 1:
        kernel.mm.mdwe = True
    return 0


CALLS = {"prctl": prctl}
