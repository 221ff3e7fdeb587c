"""Layouts and calls for tests of the rules, from literal values."""

from __future__ import annotations

from collections.abc import Collection

from vmatrace.kernel import rule_set
from vmatrace.rules.context import Kernel
from vmatrace.simulator import (
    AddressSpace,
    Config,
    Limits,
    MmState,
    Operation,
    Result,
    apply,
)
from vmatrace.vma import (
    MAY_ALL,
    Vma,
    parse_flags,
)

PAGE = 4096
RW = parse_flags(["READ", "WRITE", "MAYREAD", "MAYWRITE", "MAYEXEC"])
RO = parse_flags(["READ", "MAYREAD", "MAYWRITE", "MAYEXEC"])
PLAIN = Limits(config=Config(soft_dirty=False))
ANON_FIXED = 0x32
# PROT_NONE, private.
NONE = MAY_ALL


def vma(start: int, end: int, flags: int = RW, **more: object) -> Vma:
    """A VMA over pages [start, end) at linear page offset, its object named by its first page."""
    made = Vma(start * PAGE, end * PAGE, flags, start, obj=start)
    return made._replace(**more)  # type: ignore[arg-type]


def kernel(
    rules: str = "7.3", vmas: tuple[Vma, ...] = (), limits: Limits = PLAIN, off: Collection[str] = (), **inputs: object
) -> Kernel:
    """What a rule sees: these VMAs, an mm that counts nothing else, these inputs."""
    return Kernel(AddressSpace(vmas), MmState(map_count=len(vmas)), rule_set(rules), limits, off, inputs)


def run(
    rules: str, vmas: list[Vma], call: str, args: dict[str, int], limits: Limits = PLAIN, mm: MmState | None = None,
    off: Collection[str] = (), **inputs: object,
) -> Result:  # fmt: skip
    """One call on a layout, under a named rule set, some rules off."""
    return apply(AddressSpace(vmas), Operation(call, args, inputs), rule_set(rules), mm, limits, off)
