"""Why merges were refused: as the decisions layer saw it, else told from the VMAs that stayed neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from vmatrace.explain import obstacles
from vmatrace.ingest import Operation, Trace
from vmatrace.kernel import KernelProfile
from vmatrace.replay import engine
from vmatrace.replay.attempts import Refusal
from vmatrace.rules.model import Limits
from vmatrace.vma import SOFTDIRTY, Vma

_BORN: Final = ("new", "copy")


class Refusals:
    """The refused merges of a trace and every condition that refused each (the fields of `Refusal`, as a dict)."""

    def __init__(self, trace: Trace) -> None:
        decided = engine.run(trace).decisions if trace.decisions.present else ()
        self._decided = {each.place: [reason._asdict() for reason in each.refusals] for each in decided}
        self._rules = KernelProfile.from_dict(trace.kernel).rule_set()
        self._limits = Limits(page_size=trace.page_size)

    def of_decision(self, place: int) -> list[dict[str, Any]]:
        """The conditions that refused the merge attempt which is the decision at that index."""
        return self._decided.get(place, [])

    def of_operation(self, operation: Operation) -> list[dict[str, Any]]:
        """``start``, ``end`` and ``reasons`` of each VMA that the operation made or changed, and of a merge's survivor
        for the side on which it did not merge.

        Inferred: the VMA and its neighbours as they were afterwards are asked. A neighbour with nothing in the way is
        left out, as the kernel did not try.
        """
        if operation.kind != "call" or not operation.changed or not operation.sections:
            return []
        read = {vma.start: vma for walk in operation.sections[-1].after for vma in walk.vmas}
        after = sorted(read.values(), key=lambda vma: vma.start)
        found = []
        for vma, sides in _touched(operation, after):
            refusals = [refusal for side in sides for refusal in self._of_side(vma, side, after)]
            if refusals:
                reasons = [reason._asdict() for reason in refusals]
                found.append({"start": vma.start, "end": vma.end, "reasons": reasons})
        return found

    def _of_side(self, vma: Vma, side: str, around: list[Vma]) -> Iterator[Refusal]:
        for other in around:
            pair = (other, vma) if side == "left" else (vma, other)
            if pair[0].end == pair[1].start:
                for each in obstacles(*pair, self._rules, self._limits):
                    yield Refusal(side, each.rule, each.text, each.commit, each.remedy)
                return


def _touched(operation: Operation, after: list[Vma]) -> Iterator[tuple[Vma, tuple[str, ...]]]:
    """The VMAs that the operation made, or gave other attributes, and the sides on which they merged with nobody."""
    born = {effect.obj for effect in operation.detail if effect.kind in _BORN}
    merged = {effect.obj: effect.side for effect in operation.detail if effect.kind == "merge"}
    before = [vma for section in operation.sections for walk in section.before for vma in walk.vmas]
    for vma in after:
        if vma.obj in merged:
            # The survivor lay there: only the range's other side was refused.
            yield vma, {"left": ("right",), "right": ("left",)}.get(merged[vma.obj] or "", ())
            continue
        old = next((each for each in before if each.start <= vma.start < each.end), None)
        if vma.obj in born or (old is not None and _attributes(old) != _attributes(vma)):
            yield vma, ("left", "right")


def _attributes(vma: Vma) -> tuple[object, ...]:
    return vma.flags & ~SOFTDIRTY, vma.policy, vma.name, vma.uffd
