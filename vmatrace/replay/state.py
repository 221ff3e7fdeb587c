"""The model of one address space, and how what was read of the real one is held against it.

The model is chained: it begins with a whole read and from then on only the rules change it. What a read shows
besides may differ only as the kernel may change a VMA outside the write lock; all else is a difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

from vmatrace.replay.intervals import Intervals
from vmatrace.replay.space import Change, TracedSpace, WatchedSpace
from vmatrace.rules.model import MmState
from vmatrace.vma import ACCESS, MAYBE_GUARD, MAYWRITE, SHARED, SOFTDIRTY, Vma, flag_names

EVERYTHING: Final = (1 << 64) - 1

Interval = tuple[int, int]

# Fields of a VMA that are compared as they are, by their place in the value.
_PLAIN_FIELDS: Final = ((3, "pgoff"), (5, "anonymous"), (6, "close hook"), (9, "userfaultfd"), (11, "name"))

# Stands in the history where anything may have happened.
_LOST: Final[tuple[list[Interval], list[Change]]] = ([], [])

# Operations of an address space that are remembered; what was last read before them counts as long ago.
_REMEMBERED: Final = 256

def is_symbol(identity: Hashable) -> bool:
    """Whether an identity is of the model and not read yet: a negative number, or a tuple ending in one."""
    if type(identity) is int:
        return identity < 0
    return type(identity) is tuple and bool(identity) and type(identity[-1]) is int and identity[-1] < 0


class Gains(NamedTuple):
    """Where in a comparison a VMA stands: what may have changed outside the write lock, and who is beside it."""

    allowed: bool
    model: Sequence[Vma]
    rows: Sequence[Vma]
    at: int

    def neighbours(self, space: TracedSpace) -> list[tuple[Vma, bool]]:
        """The VMAs above and below, as seen, each with whether it had its anon_vma before this comparison."""
        rows, at = self.rows, self.at
        found: list[tuple[Vma, bool]] = []
        above = space.find(rows[at].end) if at + 1 == len(rows) else None
        below = space.below(rows[at].start) if at == 0 else None
        if at + 1 < len(rows):
            found.append((rows[at + 1], self.model[at + 1].anon_vma is not None))
        if at:
            found.append((rows[at - 1], self.model[at - 1].anon_vma is not None))
        return found + [(vma, True) for vma in (above, below) if vma is not None]


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
        "bound", "counters_known", "credits", "execute_pkey", "forked_uffd", "guards", "history", "homes", "inherited",
        "kernel",
        "lossy", "mm", "pid",
        "seq", "space", "unknown",
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
        self.history: deque[tuple[list[Interval], list[Change]]] = deque(maxlen=_REMEMBERED)
        #: anon_vma gains that were seen as events and not yet in a VMA.
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

    # ---- what is known ----

    def forget(self) -> None:
        """Everything may have changed: records were lost."""
        self.forget_interval(0, EVERYTHING)
        self.counters_known = False
        self.history.append(_LOST)

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
        self, lo: int, hi: int, rows: Sequence[Vma], names: dict[Hashable, Hashable], gains: bool
    ) -> str:
        """Hold ``rows``, complete for ``[lo, hi)``, against the model; "" or the first difference.

        Symbols are bound to what was read; ``names`` holds the objects born in the operation. ``gains``:
        what may change outside the write lock may have changed.
        """
        model = self.space.overlapping(lo, hi)
        if self.kernel.two_offsets:
            rows = [self._with_offset(row) for row in rows]
        if model == rows:
            return ""
        if len(model) != len(rows):
            return _layout_difference(model, rows)
        for at, (mine, seen) in enumerate(zip(model, rows, strict=True)):
            if mine is seen or mine == seen:
                continue
            why = self._unify(mine, seen, names, Gains(gains, model, rows, at))
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
            if expected != seen.obj and not (is_symbol(expected) and not is_symbol(seen.obj)):
                return f"{_at(seen)}: another VMA object than expected"
        if mine.flags != seen.flags and not self._flags_may_differ(mine, seen, gains.allowed):
            return f"{_at(seen)}: flags {_flags(seen.flags)}, expected {_flags(mine.flags)}"
        for number, name in _PLAIN_FIELDS:
            if mine[number] != seen[number]:
                return f"{_at(seen)}: {name} {_text(seen[number])}, expected {_text(mine[number])}"
        if mine.policy != seen.policy:
            return f"{_at(seen)}: policy {seen.policy}, expected {mine.policy}"
        if mine.file != seen.file and not self._bind(mine.file, seen.file):
            return f"{_at(seen)}: another file than expected"
        if mine.anon_vma != seen.anon_vma and not self._bind(mine.anon_vma, seen.anon_vma):
            if mine.anon_vma is None and gains.allowed:
                return self._gain(seen, gains)
            return f"{_at(seen)}: {_av(seen)}, expected {_av(mine)}"
        if mine.forked != seen.forked:
            return f"{_at(seen)}: forked {seen.forked}, expected {mine.forked}"
        if seen.anon_vma is not None:
            self.homes[seen.anon_vma] = seen.start
        return ""

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

    def _gain(self, seen: Vma, gains: Gains) -> str:
        """A VMA has an anon_vma that the model does not know: whether it may have gained it."""
        if seen.flags & (SHARED | MAYWRITE) != MAYWRITE and not self._guarded(seen):
            return f"{_at(seen)}: an anon_vma in a mapping that can have none"
        if seen.forked:
            if self.inherited <= 0 and not self.lossy:
                return f"{_at(seen)}: a forked anon_vma that no fork explains"
            self.inherited -= 1
            return ""
        if self.credits <= 0 and not self.lossy:
            return f"{_at(seen)}: an anon_vma that no fault explains"
        self.credits -= 1
        self.history.append(([], [((), (seen,))]))
        donors = [(v, old) for v, old in gains.neighbours(self.space) if _may_share(v, seen, self.kernel.shift)]
        if any(donor.anon_vma == seen.anon_vma for donor, _ in donors) or self._changed_beside(seen):
            return ""
        if self._handed_on(seen) or self._unread_donor(seen, gains):
            return ""
        if any(old for _, old in donors):
            return f"{_at(seen)}: a new anon_vma, expected the neighbour's"
        home = self.homes.get(seen.anon_vma)
        other = self.space.at(home) if home is not None else None
        if other is not None and other.anon_vma == seen.anon_vma and other.start != seen.start:
            return f"{_at(seen)}: the anon_vma of a VMA that cannot share it"
        self.homes[seen.anon_vma] = seen.start
        return ""

    def _handed_on(self, seen: Vma) -> bool:
        """Whether neighbours that gained an anon_vma unseen may have handed it on, one to the next."""
        shift, found = self.kernel.shift, self.space
        for up in (False, True):
            vma = seen
            # Each one between that has none yet must have had a fault of its own.
            for _ in range(self.credits + 1):
                beside = found.at(vma.end if up else vma.start - 1)
                if beside is None or not _fit(vma, beside, shift):
                    break
                if beside.anon_vma is not None:
                    if beside.anon_vma == seen.anon_vma and not beside.forked:
                        return True
                    break
                vma = beside
        return False

    def _unread_donor(self, seen: Vma, gains: Gains) -> bool:
        """Whether a neighbour that was not read may have gained an anon_vma first, and this VMA shares that."""
        if self.credits <= 0 and not self.lossy:
            return False
        above = self.space.at(seen.end) if gains.at + 1 == len(gains.rows) else None
        below = self.space.at(seen.start - 1) if gains.at == 0 else None
        return any(
            other is not None and other.anon_vma is None and _fit(other, seen, self.kernel.shift)
            for other in (above, below)
        )

    def _guarded(self, seen: Vma) -> bool:
        """Whether guard regions gave a VMA its anon_vma where they did that to any: before they spared files."""
        return self.kernel.any_guarded and any(lo < seen.end and seen.start < hi for lo, hi in self.guards)

    def _changed_beside(self, seen: Vma) -> bool:
        """Whether a VMA beside this one changed after it was last read: the fault may have come before that."""
        if any(_concerns(vma, seen) for old, new in self.space.journal for vma in (*old, *new)):
            return True
        for walks, changes in reversed(self.history):
            if walks is _LOST[0]:
                return True
            if any(new == (seen,) for _, new in changes):
                continue  # this very gain
            if any(lo <= seen.start < hi for lo, hi in walks):
                return False
            if any(_concerns(vma, seen) for old, new in changes for vma in (*old, *new)):
                return True
        return len(self.history) == _REMEMBERED


def _concerns(vma: Vma, seen: Vma) -> bool:
    """Whether a VMA touches another, or has its anon_vma."""
    return (vma.start <= seen.end and seen.start <= vma.end) or vma.anon_vma == seen.anon_vma


def _may_share(donor: Vma, vma: Vma, shift: int) -> bool:
    """Whether find_mergeable_anon_vma would take the anon_vma of ``donor`` for ``vma``."""
    return donor.anon_vma is not None and not donor.forked and _fit(donor, vma, shift)


def _fit(one: Vma, other: Vma, shift: int) -> bool:
    """anon_vma_compatible: adjacent and alike but for what mprotect may change."""
    lower, upper = (one, other) if one.start < other.start else (other, one)
    if lower.end != upper.start:
        return False
    if lower.policy != upper.policy or lower.file != upper.file:
        return False
    if (lower.flags ^ upper.flags) & ~(ACCESS | SOFTDIRTY | MAYBE_GUARD):
        return False
    return lower.pgoff - upper.pgoff == (lower.start - upper.start) >> shift


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


def _at(vma: Vma) -> str:
    return _range(vma)


def _flags(bits: int) -> str:
    return "|".join(flag_names(bits)) or "none"


def _text(value: object) -> str:
    return f"{value:#x}" if type(value) is int else str(value)


def _av(vma: Vma) -> str:
    if vma.anon_vma is None:
        return "no anon_vma"
    return "a forked anon_vma" if vma.forked else "an anon_vma"
