"""Predicts what an operation does to an address space: runs the rules, holds none of its own."""

from __future__ import annotations

from collections.abc import Collection

from vmatrace.kernel import RuleSet
from vmatrace.rules.model import (
    Change,
    Config,
    Copy,
    Effect,
    FileGiven,
    Grow,
    Limits,
    Merge,
    MmState,
    New,
    Operation,
    Result,
    Shrink,
    Split,
    Unmap,
    Unmodelled,
    counters_of,
)
from vmatrace.vma import AddressSpace


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
    counted from the space. ``disabled`` names rules to switch off (power tests). Raises Unmodelled, with the space
    and the mm as they were, where the model cannot know; a failing call is a Result with an errno.
    """
    raise Unmodelled(f"no rules yet for {operation.name}")


__all__ = [
    "AddressSpace", "Change", "Config", "Copy", "Effect", "FileGiven", "Grow", "Limits", "Merge", "MmState", "New",
    "Operation", "Result", "RuleSet", "Shrink", "Split", "Unmap", "Unmodelled", "apply", "counters_of",
]  # fmt: skip
