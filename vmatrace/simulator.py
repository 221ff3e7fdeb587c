"""Predicts what an operation does to an address space: runs the rules, holds none of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vmatrace.errors import UsageError, nearest
from vmatrace.kernel import RuleSet
from vmatrace.rules import load_all, steps
from vmatrace.rules.accounting import counters_of
from vmatrace.rules.context import Kernel
from vmatrace.rules.model import (
    Change,
    Config,
    Copy,
    Effect,
    FileGiven,
    Grow,
    ImpossibleInput,
    KernelError,
    Limits,
    Merge,
    MmState,
    New,
    Operation,
    Policy,
    Result,
    Shrink,
    Split,
    Unmap,
    Unmodelled,
)
from vmatrace.rules.registry import RULES, Rule
from vmatrace.vma import AddressSpace

Handler = Callable[[Kernel, Operation], int]

#: The bare steps of a scenario, by operation name.
STEPS: dict[str, Handler] = {
    "merge_new": steps.merge_new,
    "expand_only": steps.expand_only,
    "modify": steps.modify_range,
    "merge_extend": steps.merge_extend,
    "copy_vma": steps.copy_step,
    "expand": steps.expand_step,
    "shrink": steps.shrink_step,
    "mmap_region": steps.map_step,
}

CALLS: dict[str, Handler] = load_all()
_HANDLERS: dict[str, Handler] = {**CALLS, **STEPS}
_DEFAULT_LIMITS = Limits()


def apply(
    space: AddressSpace,
    operation: Operation,
    rules: RuleSet,
    mm: MmState | None = None,
    limits: Limits | None = None,
    disabled: Collection[str] = (),
) -> Result:
    """Run one operation on ``space`` by the rules of one kernel, and say what it did.

    ``space`` and ``mm`` are changed in place (copy them first to try two rule sets). Without ``mm``, one is
    counted from the space. ``disabled`` names rules to switch off (power tests). Raises Unmodelled, with
    the space and the mm as they were, where the model cannot know; a failing call is a Result with an
    errno.
    """
    handler = _HANDLERS.get(operation.name)
    if handler is None:
        raise Unmodelled(f"no rules for {operation.name}")
    limits = limits or _DEFAULT_LIMITS
    if mm is None:
        mm = counters_of(space, limits.page_size)
    kernel = Kernel(space, mm, rules, limits, disabled, operation.inputs)
    before = mm.snapshot()
    errno, ret = None, 0
    space.begin()
    try:
        ret = handler(kernel, operation)
    except KernelError as error:
        errno = error.errno
    except Unmodelled:
        space.undo()
        mm.restore(before)
        raise
    space.commit()
    return Result(
        errno, ret, tuple(kernel.effects), tuple(kernel.decided), tuple(kernel.asked), space, mm,
        kernel.child, kernel.child_mm, frozenset(kernel.maybe_errnos),
    )  # fmt: skip


def check_rule_ids(ids: Collection[str]) -> None:
    """Raise UsageError, naming the nearest, for an id that is no rule."""
    for id in ids:
        if id not in RULES:
            near = nearest(id, RULES)
            raise UsageError(
                f"unknown rule {id!r}", f"did you mean {near}?" if near else "`vmatrace rules` lists them"
            )


__all__ = [
    "CALLS", "RULES", "STEPS", "AddressSpace", "Change", "Config", "Copy", "Effect", "FileGiven", "Grow",
    "ImpossibleInput", "Limits",
    "Merge", "MmState", "New", "Operation", "Policy", "Result", "Rule", "RuleSet", "Shrink", "Split",
    "Unmap", "Unmodelled",
    "apply", "check_rule_ids", "counters_of",
]  # fmt: skip
