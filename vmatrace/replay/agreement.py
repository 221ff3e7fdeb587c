"""Do both layers tell the same of an operation? The merges and cuts of its decisions against its effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from vmatrace.ingest.decisions import Decision
from vmatrace.ingest.effects import EFFECTS
from vmatrace.ingest.match import CALL, FAULT, OTHER
from vmatrace.ingest.trace import Trace
from vmatrace.replay.occurrence import Occurrence
from vmatrace.schema import EVIDENCE, OP_CLASSES

_STORE: Final = EVIDENCE["EVIDENCE_STORE"]
_BIRTHS: Final = (EVIDENCE["EVIDENCE_ALLOC"], EVIDENCE["EVIDENCE_DUP"])
_BRK: Final = OP_CLASSES["OP_BRK"]
_FORK: Final = OP_CLASSES["OP_FORK"]
_BORN: Final = ("VMA_ALLOC", "VMA_DUP")
_SEEN_BY: Final = {
    "merge": ("MERGE_NEW", "MERGE_EXISTING"), "split": ("SPLIT",), "birth": _BORN, "unmap": ("UNMAP_COMPLETE",),
}  # fmt: skip
# Before v6.12 the function that unmaps does not say how many VMAs went.
_COUNTS_UNMAPS: Final = "vms_complete_munmap_vmas"


class Difference(NamedTuple):
    """What one layer tells and the other does not; ``excuse``: why that proves nothing."""

    text: str
    operations: str
    decisions: str
    excuse: str


def disagreement(trace: Trace, seen: Occurrence, made: Sequence[Decision], lossy: bool) -> list[Difference]:
    """Where the decisions of an operation and its effects differ; nothing where both tell the same.

    ``lossy``: a record may be missing between the task's last operation and the end of this one.
    """
    lost = lossy or seen.lost or any((each.space, each.seq) in trace.decisions.lost for each in seen.sections)
    if seen.columns.kind not in (CALL, FAULT, OTHER):
        return []
    merges = _merges(made, trace.feature("vmg") is not False)
    found = []
    for kind, count, mine in _counts(trace, seen, made, merges):
        if count != mine:
            text = f"{mine} {kind}s by decisions, {count} by effects"
            excuse = "decisions were lost" if lost else _unseen(trace, seen, kind) if count > mine else ""
            found.append(Difference(text, f"{count} {kind}", f"{mine} {kind}", excuse))
    unstored = [] if found or seen.interleaved else _unstored(merges, seen)
    for decision in unstored:
        result = decision.rows["result"]
        text = f"{decision.what} made [{result[0]:#x}, {result[1]:#x}), and no such store was seen"
        found.append(Difference(text, "no such store", text, "decisions were lost" if lost else ""))
    return found


def has_steps(seen: Occurrence) -> bool:
    """Whether an operation has merges or cuts that two layers can agree on."""
    effects = seen.columns.effects
    return bool(effects[EFFECTS.index("merge")] or effects[EFFECTS.index("split")])


def _counts(
    trace: Trace, seen: Occurrence, made: Sequence[Decision], merges: Sequence[Decision]
) -> Iterator[tuple[str, int, int]]:
    """What both layers count: its name, how many by effects and by decisions."""
    effects = dict(zip(EFFECTS, seen.columns.effects, strict=False))
    yield "merge", effects["merge"], len(merges)
    yield "split", effects["split"], sum(each.what == "SPLIT" and each.error == 0 for each in made)
    if seen.interleaved:  # some of its sections are not here
        return
    # The births of a fork are the child's.
    if all(map(trace.decisions.sees, _BORN)) and all(section.op_class != _FORK for section in seen.sections):
        births = sum(event[0] in _BIRTHS for event in seen.events)
        yield "birth", births, sum(each.what in _BORN and each.result != 0 for each in made)
    unmaps = [each for each in made if each.what == "UNMAP_COMPLETE"]
    if trace.deaths and unmaps and all(each.function == _COUNTS_UNMAPS for each in unmaps):
        yield "unmap", effects["unmap"], sum(each.delta for each in unmaps)


def _merges(made: Sequence[Decision], vmg: bool) -> list[Decision]:
    """The successes of the merge step: attempts that hold no other attempt, and before v6.12 a mmap's own."""
    attempts = [each for each in made if each.attempt]
    leaves = [each for each in attempts if not any(each.contains(other) for other in attempts)]
    found = [each for each in leaves if each.merged]
    if not vmg:
        moves = [each for each in made if each.attempt or each.what == "RELOCATE"]
        found += [
            each
            for each in made
            if each.what == "EXPAND" and each.error == 0 and not any(other.contains(each) for other in moves)
        ]
    return found


def _unstored(merges: Iterable[Decision], seen: Occurrence) -> list[Decision]:
    """Merges whose survivor was not stored with the range that it had afterwards."""
    stores = Counter(event[1:] for event in seen.events if event[0] == _STORE)
    missing = []
    for each in merges:
        result = each.rows.get("result")
        if result is None:
            continue
        key = (result[5], result[0], result[1])
        if not stores[key]:
            missing.append(each)
        stores[key] -= 1
    return missing


def _unseen(trace: Trace, seen: Occurrence, kind: str) -> str:
    """Why there may be more effects than decisions: a function without a probe."""
    decisions, vmg = trace.decisions, trace.feature("vmg") is not False
    kinds = _SEEN_BY[kind] if vmg or kind != "merge" else (*_SEEN_BY[kind], "EXPAND")
    missing = decisions.missing(*kinds) or [each for each in kinds if not decisions.sees(each)]
    if missing:
        return f"no probe sees every {kind}: {', '.join(missing)}"
    if kind == "merge" and not vmg and any(section.op_class == _BRK for section in seen.sections):
        return "brk merges by itself in this kernel, where no function can be probed"
    return ""
