"""What a rule sees while an operation runs: the space, the mm, the limits, the features, and what happened
so far."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, NoReturn

from vmatrace.kernel import RuleSet
from vmatrace.rules.model import Effect, KernelError, Limits, MmState, Unmodelled
from vmatrace.vma import AddressSpace, Vma

NO_INPUTS: Final[Mapping[str, Any]] = {}


class Kernel:
    """One operation on its way through the rules."""

    __slots__ = (
        "_features", "asked", "child", "child_mm", "decided", "effects", "inputs", "limits",
        "maybe_errnos", "mm", "off", "shift", "space",
    )  # fmt: skip

    def __init__(
        self,
        space: AddressSpace,
        mm: MmState,
        rules: RuleSet,
        limits: Limits,
        off: Collection[str] = (),
        inputs: Mapping[str, Any] = NO_INPUTS,
    ) -> None:
        self.space = space
        self.mm = mm
        self.limits = limits
        self.off = off
        self.inputs = inputs
        self.shift = limits.page_size.bit_length() - 1
        self.effects: list[Effect] = []
        #: Ids of the rules that decided, in order (a dict as an ordered set).
        self.decided: dict[str, None] = {}
        self.asked: dict[str, None] = {}
        #: errnos that the rules cannot rule out where they predict success (populating pages).
        self.maybe_errnos: set[str] = set()
        self._features = rules.features
        #: Set by fork.
        self.child: AddressSpace | None = None
        self.child_mm: MmState | None = None

    def has(self, feature: str) -> bool:
        """Whether the kernel has a feature; an unknown one counts as absent and is noted."""
        value = self._features[feature]
        if value is None:
            self.asked[feature] = None
            return False
        return value

    def fail(self, errno: str) -> NoReturn:
        """End the operation with an errno; what was done so far stays done."""
        raise KernelError(errno)

    def cannot_know(self, reason: str) -> NoReturn:
        """End the operation undecided."""
        raise Unmodelled(reason)

    def pages(self, length: int) -> int:
        """Bytes to pages."""
        return length >> self.shift

    def align_up(self, value: int) -> int:
        """PAGE_ALIGN."""
        mask = self.limits.page_size - 1
        return (value + mask) & ~mask

    def aligned(self, value: int) -> bool:
        """Whether an address is on a page boundary."""
        return not value & (self.limits.page_size - 1)

    def put(self, old: Vma, new: Vma) -> Vma:
        """Replace one VMA by its changed value."""
        self.space.substitute((old,), (new,))
        return new

    def add(self, vma: Vma) -> Vma:
        """Insert a VMA (vma_link) and count it."""
        self.space.substitute((), (vma,))
        self.mm.map_count += 1
        return vma

    def drop(self, vmas: Collection[Vma]) -> None:
        """Take VMAs out and count them."""
        self.space.substitute(tuple(vmas), ())
        self.mm.map_count -= len(vmas)
