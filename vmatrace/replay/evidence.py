"""The second evidence: the stores, births and deaths that a prediction implies, against those seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmatrace.replay.space import Change
from vmatrace.replay.state import is_symbol
from vmatrace.rules.model import Effect, Merge, New
from vmatrace.schema import EVIDENCE

STORE: Final = EVIDENCE["EVIDENCE_STORE"]
ALLOC: Final = EVIDENCE["EVIDENCE_ALLOC"]
DUP: Final = EVIDENCE["EVIDENCE_DUP"]
MERGED: Final = EVIDENCE["EVIDENCE_MERGED"]
UNMAPPED: Final = EVIDENCE["EVIDENCE_UNMAPPED"]
FREED: Final = EVIDENCE["EVIDENCE_FREED"]
_BIRTHS: Final = (ALLOC, DUP)

_DEATHS: Final = {
    MERGED: "a VMA merged away",
    UNMAPPED: "a VMA unmapped",
    FREED: "a VMA freed without a cause",
}

Event = tuple[int, int, int, int]
Key = tuple[int, Hashable, int, int]


@dataclass(slots=True)
class Expected:
    """What a prediction implies: births in order, stores with their ranges, deaths."""

    births: list[Hashable] = field(default_factory=list)
    stores: list[tuple[Hashable, int, int]] = field(default_factory=list)
    deaths: list[Hashable] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        """Whether any evidence is expected."""
        return bool(self.births or self.stores or self.deaths)


def expect(journal: Sequence[Change]) -> Expected:
    """The evidence that the replacements of ``journal`` leave (commit_merge, vma_complete, vma_link)."""
    found = Expected()
    for old, new in journal:
        if len(old) == 1 and len(new) == 1 and old[0][:2] == new[0][:2] and old[0].obj == new[0].obj:
            continue
        gone = {vma.obj: vma for vma in old}
        for vma in new:
            before = gone.pop(vma.obj, None)
            if before is None and vma.obj in found.deaths:
                found.deaths.remove(vma.obj)  # put back: it never left
            elif before is None:
                found.births.append(vma.obj)
                found.stores.append((vma.obj, vma.start, vma.end))
            elif vma.start < before.start or vma.end > before.end:
                found.stores.append((vma.obj, vma.start, vma.end))
        found.deaths += gone
    return found


def without_aborted(events: Sequence[Event]) -> list[Event]:
    """The events less the objects that were born and freed without ever being stored."""
    if all(what != FREED for what, _, _, _ in events):
        return list(events)
    kept: list[Event] = []
    for event in events:
        if event[0] == FREED:
            born = next((i for i in range(len(kept) - 1, -1, -1) if kept[i][1] == event[1]), None)
            if born is not None and kept[born][0] in _BIRTHS:
                del kept[born]
                continue
        kept.append(event)
    return kept


def _stored_births(events: Sequence[Event]) -> list[Event]:
    """Where deaths are unseen: the events less the births of VMAs that were made and taken back, never stored."""
    kept: list[Event] = []
    stored: set[int] = set()
    for event in reversed(events):
        what, obj = event[:2]
        if what == STORE:
            stored.add(obj)
        elif what in _BIRTHS:
            if obj not in stored:
                continue
            stored.discard(obj)  # an earlier life of the same memory
        kept.append(event)
    return kept[::-1]


def compare(
    expected: Expected,
    events: Sequence[Event],
    effects: Sequence[Effect],
    unstored_birth: bool,
    told: set[int],
    deaths: bool = True,
    stores_twice: bool = False,
) -> tuple[str, dict[Hashable, Hashable]]:
    """Hold the expected evidence against the seen: "" or the first difference, and the object of each symbol.

    ``unstored_birth``: a birth need not be stored (brk's first heap). ``told``: the causes of deaths that
    this kernel lets a trace tell; another death may have any other cause. It grows by what is seen.
    ``deaths``: whether deaths are seen where they happen (RCU frees VMAs later in some kernels).
    ``stores_twice``: the piece that a cut leaves behind is stored as well as the new one (before 6.3).
    """
    seen = without_aborted(events)
    if not deaths and not unstored_birth:
        seen = _stored_births(seen)
    births = [(obj, what) for what, obj, _, _ in seen if what in _BIRTHS]
    names: dict[Hashable, Hashable] = {}
    if len(births) != len(expected.births):
        return f"{len(births)} VMA objects were born, expected {len(expected.births)}", names
    for symbol, (obj, what) in zip(expected.births, births, strict=True):
        names[symbol] = obj
        anew = any(type(effect) is New and effect.obj == symbol for effect in effects)
        if what != (ALLOC if anew else DUP):
            return "a VMA was copied, expected a new one" if anew else "a VMA was made anew, expected a copy", names
    if not seen and not expected.anything:
        return "", names
    _name_unread(expected, seen, names)
    victims = {victim for effect in effects if type(effect) is Merge for victim in effect.victims}
    wanted: list[Key] = [(STORE, names.get(obj, obj), start, end) for obj, start, end in expected.stores]
    if deaths:
        wanted += [(MERGED if obj in victims else UNMAPPED, names.get(obj, obj), 0, 0) for obj in expected.deaths]
    got: list[Key] = [event for event in seen if event[0] not in _BIRTHS]
    told.update(event[0] for event in seen)
    if stores_twice:
        stores = Counter(key for key in got if key[0] == STORE) & Counter(wanted)
        got = [*stores.elements(), *(key for key in got if key[0] != STORE)]
    if len(wanted) == len(got) and all(key in got for key in wanted) and all(key in wanted for key in got):
        return _birth_with_range(seen), names
    return _birth_with_range(seen) or _difference(Counter(wanted), got, unstored_birth, told), names


def _name_unread(expected: Expected, seen: Sequence[Event], names: dict[Hashable, Hashable]) -> None:
    """Find which objects the symbols are that no read has told yet (a fork child's VMAs), by their stores."""
    for obj, start, end in expected.stores:
        if obj not in names and is_symbol(obj):
            stored = [event[1] for event in seen if event[0] == STORE and event[2:] == (start, end)]
            if len(stored) == 1:
                names[obj] = stored[0]


def _birth_with_range(seen: Sequence[Event]) -> str:
    for what, _, start, end in seen:
        if (start or end) and what in _BIRTHS:
            return "the birth of a VMA object has a range"
    return ""


def _difference(wanted: Counter[Key], seen: Sequence[Key], unstored: bool, told: set[int]) -> str:
    got: Counter[Key] = Counter()
    for what, obj, start, end in seen:
        got[_cause(wanted, obj, told) if what == FREED else what, obj, start, end] += 1
    for key in wanted - got:
        if not (unstored and key[0] == STORE):
            return f"{_name(key)} was expected and not seen"
    for key in got - wanted:
        return f"{_name(key)} was seen and not expected"
    return ""


def _cause(wanted: Counter[Key], obj: Hashable, told: set[int]) -> int:
    """What a death of unknown cause stands for: a cause that this kernel's traces never name."""
    for cause in (MERGED, UNMAPPED):
        if cause not in told and wanted[cause, obj, 0, 0]:
            return cause
    return FREED


def _name(key: Key) -> str:
    what, _, start, end = key
    if what == STORE:
        return f"the store of a VMA at [{start:#x}, {end:#x})"
    return _DEATHS.get(what, f"evidence of kind {what}")
