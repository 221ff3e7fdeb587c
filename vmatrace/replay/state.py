"""The model of one address space, and how what was read of the real one is held against it.

The model is chained: it begins with a whole read and from then on only the rules change it. What a read shows
besides may differ only as the kernel may change a VMA outside the write lock; all else is a difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

from vmatrace.replay.gains import LOST, REMEMBERED, Gains, Interval, Past, gain
from vmatrace.replay.intervals import Intervals
from vmatrace.replay.space import Change, TracedSpace, WatchedSpace
from vmatrace.rules.model import MmState
from vmatrace.vma import MAYBE_GUARD, Vma, flag_names

EVERYTHING: Final = (1 << 64) - 1

# Fields of a VMA that are compared as they are, by their place in the value.
_PLAIN_FIELDS: Final = ((3, "pgoff"), (5, "anonymous"), (6, "close hook"), (9, "userfaultfd"), (11, "name"))


def is_symbol(identity: Hashable) -> bool:
    """Whether an identity is of the model and not read yet: a negative number, or a tuple ending in one."""
    if type(identity) is int:
        return identity < 0
    return type(identity) is tuple and bool(identity) and type(identity[-1]) is int and identity[-1] < 0


class KernelFacts(NamedTuple):
    """What of the traced kernel matters to a comparison.

    ``shift``: log2 of the page size. ``any_guarded``: MADV_GUARD_INSTALL gives any VMA an anon_vma.
    ``two_offsets``: a VMA has a second page offset, which no row shows.
    """

    shift: int
    any_guarded: bool
    two_offsets: bool


class SpaceState:
    """One address space: the model, the mm's fields, and what is not known of it."""

    __slots__ = (
        "bound", "contradicted", "counters_known", "credits", "events", "execute_pkey", "forked_uffd", "guards",
        "history", "homes", "inherited", "kernel", "lossy", "mm", "now", "pid", "seq", "space", "taken", "unknown",
    )  # fmt: skip

    def __init__(self, space: TracedSpace, mm: MmState, pid: int, kernel: KernelFacts) -> None:
        self.space = space
        self.mm = mm
        self.pid = pid
        self.kernel = kernel
        #: Intervals where the real state is not known.
        self.unknown = Intervals()
        self.counters_known = True
        #: The last operations: what each read, and what it changed.
        self.history: deque[Past] = deque(maxlen=REMEMBERED)
        #: anon_vma gains that were seen as events: all of them, and those not yet seen in a VMA.
        self.events = 0
        self.credits = 0
        #: The same at the parent when this space was copied.
        self.inherited = 0
        #: Symbols of anon_vmas and files that were read meanwhile.
        self.bound: dict[Hashable, Hashable] = {}
        #: Where each anon_vma was seen last.
        self.homes: dict[Hashable, int] = {}
        #: Ranges that had a userfaultfd in the parent when this space was copied.
        self.forked_uffd: list[Interval] = []
        #: Ranges of MADV_GUARD_INSTALL calls.
        self.guards: list[Interval] = []
        #: The trace lacks records: an event that is missing proves nothing.
        self.lossy = False
        #: The mm's execute-only protection key, 0: not taken yet.
        self.execute_pkey = 0
        #: The last write section that was judged.
        self.seq = 0
        #: Address space and number of the operation that is being judged.
        self.now = (-1, -1)
        #: VMA objects of which one read told what nothing predicts, and the operation that read it.
        self.taken: dict[Hashable, tuple[int, int]] = {}
        #: The operation whose read is contradicted by the difference found last.
        self.contradicted: tuple[int, int] | None = None

    # ---- what is known ----

    def forget(self) -> None:
        """Everything may have changed: records were lost."""
        self.forget_interval(0, EVERYTHING)
        self.counters_known = False
        self.history.append(LOST)

    def forget_interval(self, lo: int, hi: int) -> None:
        """``[lo, hi)`` may have changed."""
        self.unknown.add(lo, hi)
        self.watch()

    def learn_interval(self, lo: int, hi: int) -> None:
        """``[lo, hi)`` is known again."""
        if self.unknown:
            self.unknown.remove(lo, hi)
            self.watch()

    def watch(self) -> None:
        """Let the space note where rules look, as long as they may look where nothing is known."""
        watched = type(self.space) is WatchedSpace
        if watched != bool(self.unknown):
            self.space = self.space.with_class(TracedSpace if watched else WatchedSpace)

    def was_registered(self, vma: Vma) -> bool:
        """Whether a VMA lies where the parent had one with a userfaultfd when this space was copied."""
        return any(lo < vma.end and vma.start < hi for lo, hi in self.forked_uffd)

    def is_known(self, lo: int, hi: int) -> bool:
        """Whether all of ``[lo, hi)`` is known."""
        return not self.unknown.touches(lo, hi)

    def looked_into_unknown(self) -> bool:
        """Whether the last operation looked at addresses of which nothing is known."""
        space = self.space
        return type(space) is WatchedSpace and not all(self.is_known(lo, hi) for lo, hi in space.looked)

    def adopt(self, lo: int, hi: int, rows: Sequence[Vma]) -> None:
        """Make the model say what was read of ``[lo, hi)``; where rows cannot be, it is unknown."""
        old = self.space.overlapping(lo, hi)
        new: list[Vma] = []
        for row in rows:
            if max(lo, new[-1].end if new else 0) <= row.start < row.end <= hi:
                new.append(row)
        if len(new) != len(rows):
            self.forget_interval(lo, hi)
        if old and old[0].start < lo:
            new.insert(0, old[0].cut(old[0].start, lo, self.kernel.shift))
        if old and old[-1].end > hi:
            new.append(old[-1].cut(hi, old[-1].end, self.kernel.shift))
        if old != new:
            for vma in old:
                self.space.substitute((vma,), ())
            for vma in new:
                self.space.substitute((), (vma,))

    # ---- comparing ----

    def check(
        self,
        lo: int,
        hi: int,
        rows: Sequence[Vma],
        names: dict[Hashable, Hashable],
        gains: bool,
        read: Sequence[Interval] | None = (),
    ) -> str:
        """Hold ``rows``, complete for ``[lo, hi)``, against the model; "" or the first difference.

        Symbols are bound to what was read; ``names`` holds the objects born in the operation. ``gains``:
        what may change outside the write lock may have changed. ``read``: as in `Gains`.
        """
        model = self.space.overlapping(lo, hi)
        if self.kernel.two_offsets:
            rows = [self._with_offset(row) for row in rows]
        if self.taken:
            self._confirm(model, rows)
        if model == rows:
            return ""
        if len(model) != len(rows):
            return _layout_difference(model, rows)
        for at, (mine, seen) in enumerate(zip(model, rows, strict=True)):
            if mine is seen or mine == seen:
                continue
            why = self._unify(mine, seen, names, Gains(gains, read, model, rows, at))
            if why:
                return why
            self.space.substitute((mine,), (seen,))
        return ""

    def _with_offset(self, row: Vma) -> Vma:
        """A row with the second page offset that the model has for that VMA."""
        mine = self.space.at(row.start)
        if mine is None or mine.start != row.start or mine.anon_pgoff == row.anon_pgoff:
            return row
        return row._replace(anon_pgoff=mine.anon_pgoff)

    def _unify(self, mine: Vma, seen: Vma, names: dict[Hashable, Hashable], gains: Gains) -> str:
        if mine[:2] != seen[:2]:
            return _layout_difference([mine], [seen])
        if mine.obj != seen.obj:
            expected = names.get(mine.obj, mine.obj)
            if expected != seen.obj:
                if not is_symbol(expected) or is_symbol(seen.obj):
                    return self._contradiction(mine, f"{_range(seen)}: another VMA object than expected")
                self.taken[seen.obj] = self.now
        if mine.flags != seen.flags and not self._flags_may_differ(mine, seen, gains.allowed):
            return f"{_range(seen)}: flags {_flags(seen.flags)}, expected {_flags(mine.flags)}"
        for number, name in _PLAIN_FIELDS:
            if mine[number] != seen[number]:
                return f"{_range(seen)}: {name} {_text(seen[number])}, expected {_text(mine[number])}"
        if mine.policy != seen.policy:
            return f"{_range(seen)}: policy {seen.policy}, expected {mine.policy}"
        if mine.file != seen.file and not self._bind(mine.file, seen.file):
            return f"{_range(seen)}: another file than expected"
        if mine.anon_vma != seen.anon_vma:
            if mine.anon_vma is None and gains.allowed:
                self.taken[seen.obj] = self.now
                return gain(self, seen, gains)
            if not self._bind(mine.anon_vma, seen.anon_vma):
                return self._contradiction(mine, f"{_range(seen)}: {_av(seen)}, expected {_av(mine)}")
            self.taken[seen.obj] = self.now
        if mine.forked != seen.forked:
            return f"{_range(seen)}: forked {seen.forked}, expected {mine.forked}"
        if seen.anon_vma is not None:
            self.homes[seen.anon_vma] = seen.start
        return ""

    def _confirm(self, model: Sequence[Vma], rows: Sequence[Vma]) -> None:
        """What one read told and another tells as well is no single record's word any more."""
        for mine, seen in zip(model, rows, strict=False):
            if mine == seen:
                self.taken.pop(seen.obj, None)

    def let_go(self, changes: Sequence[Change]) -> None:
        """VMA objects that are gone will not be read again."""
        for old, new in changes:
            for gone in {vma.obj for vma in old} - {vma.obj for vma in new}:
                self.taken.pop(gone, None)

    def _contradiction(self, mine: Vma, problem: str) -> str:
        """A difference that may be the fault of an earlier read, whose word alone the model took."""
        self.contradicted = self.taken.pop(mine.obj, None)
        return problem

    def _bind(self, symbol: Hashable, seen: Hashable) -> bool:
        """Whether a symbol stands for what was seen, from now on if it is new."""
        if symbol is None or seen is None or not is_symbol(symbol):
            return False
        known = self.bound.setdefault(symbol, seen)
        return known == seen

    def _flags_may_differ(self, mine: Vma, seen: Vma, gains: bool) -> bool:
        difference = mine.flags ^ seen.flags
        if difference == MAYBE_GUARD and gains and seen.flags & MAYBE_GUARD:
            return self.lossy or any(lo < seen.end and seen.start < hi for lo, hi in self.guards)
        return not difference


def _layout_difference(model: Sequence[Vma], rows: Sequence[Vma]) -> str:
    mine, seen = [_range(v) for v in model], [_range(v) for v in rows]
    for at in range(max(len(mine), len(seen))):
        a = mine[at] if at < len(mine) else "nothing"
        b = seen[at] if at < len(seen) else "nothing"
        if a != b:
            return f"{b}, expected {a}"
    return "another layout than expected"


def _range(vma: Vma) -> str:
    return f"[{vma.start:#x}, {vma.end:#x})"


def _flags(bits: int) -> str:
    return "|".join(flag_names(bits)) or "none"


def _text(value: object) -> str:
    return f"{value:#x}" if type(value) is int else str(value)


def _av(vma: Vma) -> str:
    if vma.anon_vma is None:
        return "no anon_vma"
    return "a forked anon_vma" if vma.forked else "an anon_vma"
