"""Judges decisions: each is recomputed from what the kernel looked at and compared with what it answered.

A decision has a verdict of its own. It does not lean on the model of its address space (but for a second page
offset that no record holds), so the two layers are evidence against each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from vmatrace.ingest.decisions import NOMEM, Decision, Row
from vmatrace.replay.agreement import Difference, disagreement, has_steps
from vmatrace.replay.attempts import PREDICTIONS, Case, Outcome, Prediction, Refusal, refusals_of
from vmatrace.replay.hooks import HOOK_KINDS, is_doubtful, judge_hook
from vmatrace.replay.occurrence import Occurrence, errno_name
from vmatrace.replay.result import AGREEMENT, FAILED, PASSED, UNDECIDED, DecisionVerdict
from vmatrace.rules.model import KernelError, Unmodelled
from vmatrace.schema import PROPOSAL_BITS
from vmatrace.vma import MAYWRITE, SHARED, AddressSpace, Vma, flag_names

if TYPE_CHECKING:
    from vmatrace.replay.engine import Replayer

JUDGED: Final[Mapping[str, str]] = {
    "MERGE_NEW": "merged or refused, the survivor and all its fields afterwards, the state",
    "MERGE_EXISTING": "the same; where it was refused, the VMA that was cut free",
    "MERGE_EXTEND": "the survivor that grew, or that there is none",
    "MERGE_COPIED": "the survivor, or the fields of the copy",
    "EXPAND": "outside of a merge attempt: the VMA afterwards",
    "SHRINK": "the VMA afterwards",
    "SPLIT": "the errno, and the VMA that was cut",
    "MMAP_PREPARE": "the range stays; an ordinary file changes no flag, secret memory those of its rule; the merge "
    "test that follows is given what the hook left",
    "COMPAT_MMAP": "the VMA has the flags, the file and the page offset that the hook left",
}
"""The kinds of decisions that have a verdict, and what of each is compared."""

_UNREADABLE: Final = PROPOSAL_BITS["PROPOSAL_UNREADABLE"]
_GIVE_UP: Final = PROPOSAL_BITS["PROPOSAL_GIVE_UP_ON_OOM"]
_LONGEST_NAME: Final = 39
_MERGES: Final = ("MERGE_NEW", "MERGE_EXISTING", "MERGE_EXTEND", "MERGE_COPIED")
_FIELDS: Final = (
    (0, "start"), (1, "end"), (2, "flags"), (3, "pgoff"), (4, "file"), (5, "anonymous"), (6, "close hook"),
    (7, "anon_vma"), (8, "forked"), (9, "userfaultfd"), (10, "policy"), (11, "name"),
)  # fmt: skip


def judge_decisions(
    all: Replayer, seen: Occurrence, made: Sequence[Decision], space: AddressSpace
) -> list[DecisionVerdict]:
    """The verdicts of all decisions of an operation, and of whether both layers tell the same of it.

    ``space``: the model as it was before; only a second page offset that no record holds is taken from there.
    """
    found = [verdict for each in made if (verdict := _judge(all, each, made, seen, space)) is not None]
    lossy = all.losses is not None and all.losses.between(all.ended(seen.tid), seen.last_index)
    differences = disagreement(all.trace, seen, made, lossy)
    found += [_disagrees(seen, difference) for difference in differences]
    if not differences and has_steps(seen):
        found.append(_agreement(seen, PASSED, ""))
    return found


def _disagrees(seen: Occurrence, difference: Difference) -> DecisionVerdict:
    if difference.excuse:
        return _agreement(seen, UNDECIDED, difference.excuse)
    reason = f"the layers disagree: {difference.text}"
    return _agreement(seen, FAILED, reason, difference.operations, difference.decisions)


def _agreement(seen: Occurrence, verdict: str, reason: str, expected: str = "", observed: str = "") -> DecisionVerdict:
    columns = seen.columns
    return DecisionVerdict(
        columns.space, seen.pid, seen.tid, columns.number, seen.name, AGREEMENT, "", verdict, reason,
        expected=expected, observed=observed, place=columns.order,
    )  # fmt: skip


def _judge(
    all: Replayer, asked: Decision, made: Sequence[Decision], seen: Occurrence, space: AddressSpace
) -> DecisionVerdict | None:
    """The verdict of one decision; None where its kind is not judged."""
    inner = tuple(each for each in made if asked.contains(each))
    if asked.what == "EXPAND" and any(each.attempt and each.contains(asked) for each in made):
        return None  # the merge attempt around it is judged
    if asked.what in HOOK_KINDS:
        outcome = judge_hook(all, asked, inner, made, seen)
    elif asked.what not in PREDICTIONS:
        return None
    elif asked.bits & _UNREADABLE:
        outcome = Outcome(UNDECIDED, "what it looked at could not be read")
    else:
        outcome = _recompute(all, asked, made, seen, space)
    step = asked.attempt and not any(each.attempt for each in inner)
    return DecisionVerdict(
        asked.space, asked.pid, asked.tid, seen.columns.number, seen.name, asked.what, asked.function,
        outcome.verdict, outcome.reason, outcome.rules, asked.merged if step else None,
        outcome.refusals if step and not asked.merged else (), outcome.expected, outcome.observed, asked.start,
        asked.end, asked.time, asked.place,
    )  # fmt: skip


def _recompute(
    all: Replayer, asked: Decision, made: Sequence[Decision], seen: Occurrence, space: AddressSpace
) -> Outcome:
    """Predict a decision, and compare."""
    try:
        vmas, guessed = _looked_at(all, asked, made, seen, space)
        case = Case(asked, vmas, all.limits.of(asked.pid, asked.abi), all.rules, all.without)
        predicted = PREDICTIONS[asked.what](case)
        open_features = [id for id in predicted.asked if _differs(case, predicted, id)]
    except (Unmodelled, KernelError) as error:
        return Outcome(UNDECIDED, str(error))
    refused = refusals_of(case, predicted) if asked.attempt and not predicted.merged else ()
    if open_features:
        return _open("the kernel's features are not known: " + ", ".join(open_features), predicted, refused)
    if guessed and predicted.merged and _second_offset_decides(all, asked):
        return _open("the second page offset of the next VMA is not in the record", predicted, refused)
    if predicted.after is not None and "result" not in vmas and (asked.result or asked.what not in _MERGES):
        return _open("the VMA that came of it was not read", predicted, refused)
    problem = _difference(asked, predicted, vmas.get("result"))
    if not problem:
        return Outcome(PASSED, "", predicted.rules, refused)
    excuse = _excuse(asked, predicted, made)
    if any(is_doubtful(all, vma.file, seen) for vma in vmas.values()):
        excuse = excuse or "records were lost since a file was described"
    if excuse:
        return _open(excuse, predicted, refused)
    return Outcome(FAILED, problem, predicted.rules, refused, *_told(asked, predicted))


def _open(reason: str, predicted: Prediction, refused: tuple[Refusal, ...]) -> Outcome:
    return Outcome(UNDECIDED, reason, predicted.rules, refused)


# ---- what the kernel looked at ----


def _looked_at(
    all: Replayer, asked: Decision, made: Sequence[Decision], seen: Occurrence, space: AddressSpace
) -> tuple[dict[str, Vma], bool]:
    """The VMAs by role, and whether the second page offset of one is not known."""
    rows: dict[str, Row] = dict(asked.rows)
    offsets: dict[str, int] = dict(asked.offsets)
    if asked.what == "MERGE_EXISTING" and "next" not in rows and "middle" in rows and asked.end == rows["middle"][1]:
        if any(_reached(each, asked) for each in made):
            raise Unmodelled("the next VMA may have changed since it was read")
        beyond = _read_before(asked, seen, asked.end)
        if beyond is not None and beyond[0] == asked.end:
            rows["next"] = beyond
            mine = space.at(beyond[0])
            if mine is not None and mine.anon_pgoff is not None and (mine.start, mine.obj) == (beyond[0], beyond[5]):
                offsets["next"] = mine.anon_pgoff
    if asked.what == "EXPAND" and "source" in rows and asked.end > rows["source"][1]:
        # Before v6.12 the VMA that is swallowed is not looked at; it ends where the range does.
        swallowed = _read_before(asked, seen, asked.end - 1)
        if swallowed is not None and swallowed[1] == asked.end:
            rows["next"] = swallowed
    if asked.what in ("MERGE_EXTEND", "MERGE_COPIED"):
        step = next((each for each in made if each.what == "MERGE_NEW" and asked.contains(each)), None)
        if step is None:
            raise Unmodelled("the merge step inside it was not seen")
        rows |= {role: row for role, row in step.rows.items() if role in ("prev", "next")}
        offsets |= {role: offset for role, offset in step.offsets.items() if role in ("prev", "next")}
    if not all.kernel.two_offsets:
        return {role: all.vma(row) for role, row in rows.items()}, False
    vmas = {role: all.vma(row)._replace(anon_pgoff=offsets.get(role)) for role, row in rows.items()}
    return vmas, "next" in rows and "next" not in offsets


def _reached(earlier: Decision, asked: Decision) -> bool:
    """Whether an earlier decision of the section lay above where ``asked`` ends: a call that goes downwards."""
    same = earlier.seq == asked.seq and earlier.tid == asked.tid and earlier.entered < asked.entered
    return same and (earlier.attempt or earlier.what == "SPLIT") and max(earlier.start, earlier.end) > asked.end


def _read_before(asked: Decision, seen: Occurrence, address: int) -> Row | None:
    """The VMA that holds ``address``, as read when the section began.

    None where there is none; raises Unmodelled where nothing was read.
    """
    section = next((each for each in seen.sections if each.seq == asked.seq), None)
    for start, end, flags, _ in section.before_cover if section is not None else ():
        if flags == 0 and start <= address < end and section is not None:
            return next((row for row in section.before if row[0] <= address < row[1]), None)
    raise Unmodelled("the next VMA was not read")


def _second_offset_decides(all: Replayer, asked: Decision) -> bool:
    """Whether the merge is one of private file mappings, whose second page offsets are compared."""
    return bool(all.kernel.two_offsets and asked.file) and asked.flags & (SHARED | MAYWRITE) == MAYWRITE


# ---- comparing ----


def _differs(case: Case, predicted: Prediction, feature: str) -> bool:
    """Whether the other value of an unknown feature leads to another prediction."""
    other = PREDICTIONS[case.decision.what](case.under(feature, True))
    return other[:4] != predicted[:4]


def _difference(asked: Decision, predicted: Prediction, after: Vma | None) -> str:
    """What differs between the prediction and the kernel's answer, or nothing."""
    if asked.error < 0:
        name = errno_name(asked.error)
        return "" if predicted.errno == name else f"it failed with {name}, expected {_outcome(predicted)}"
    if predicted.errno is not None:
        return f"it did not fail, expected {predicted.errno}"
    if asked.attempt and asked.what != "MERGE_COPIED" and asked.merged != predicted.merged:
        return f"the kernel {'merged' if asked.merged else 'refused'}, expected {_outcome(predicted)}"
    problem = _state_differs(asked, predicted)
    if problem:
        return problem
    mine = predicted.after
    if predicted.result is not None and asked.result != predicted.result and not _is_new(predicted.result):
        return f"another VMA object was returned than expected, {_outcome(predicted)}"
    if mine is None or (asked.what in _MERGES and not asked.result):
        return "" if mine is None else f"no VMA was returned, expected {_outcome(predicted)}"
    if after is None:
        return ""  # `_unread` says so
    return _vma_differs(mine, after)


def _state_differs(asked: Decision, predicted: Prediction) -> str:
    """vma_merge_struct.state against the outcome, where the function has one."""
    if not asked.state or not asked.attempt:
        return ""
    if asked.state == NOMEM:
        return f"the merge ran out of memory, expected {_outcome(predicted)}"
    return ""


def _is_new(identity: object) -> bool:
    """Whether an object is one that the model made: the kernel's is not known before."""
    return type(identity) is int and identity < 0


def _vma_differs(mine: Vma, seen: Vma) -> str:
    for number, name in _FIELDS:
        if mine[number] != seen[number]:
            return f"{name} {_text(number, seen[number])} afterwards, expected {_text(number, mine[number])}"
    if mine.obj != seen.obj and not _is_new(mine.obj):
        return "another VMA object was read afterwards"
    return ""


def _text(number: int, value: Hashable) -> str:
    if number == 2 and isinstance(value, int):
        return "|".join(flag_names(value)) or "none"
    if number in (4, 7, 9):
        return "none" if value is None else f"id {value:x}" if isinstance(value, int) else str(value)
    return f"{value:#x}" if type(value) is int else str(value)


def _excuse(asked: Decision, predicted: Prediction, made: Iterable[Decision]) -> str:
    """Why a difference proves nothing: memory that ran out, what a record cannot hold."""
    failed = any(each.what == "EXPAND" and each.error == -12 and asked.contains(each) for each in made)
    if predicted.merged and (asked.state == NOMEM or failed or asked.error == -12):
        return "the merge ran out of memory"
    if predicted.merged and not asked.merged and asked.bits & _GIVE_UP:
        return "a merge that may fail without a word when memory runs out"
    if asked.error == -12 and asked.state != NOMEM and _cuts(asked):
        return "ENOMEM: the map count or the memory at that moment is not in the record"
    if asked.attempt and not asked.merged and predicted.merged and len(asked.name) >= _LONGEST_NAME:
        return "a name longer than the record holds"
    return ""


def _cuts(asked: Decision) -> bool:
    """Whether memory is needed though nothing merges: a VMA is cut or made."""
    middle = asked.rows.get("middle")
    return asked.what != "MERGE_EXISTING" or middle is None or (asked.start, asked.end) != middle[:2]


def _outcome(predicted: Prediction) -> str:
    if predicted.errno is not None:
        return predicted.errno
    after = predicted.after
    where = f" [{after.start:#x}, {after.end:#x})" if after is not None else ""
    return ("a merge to" if predicted.merged else "no merge," if after is None else "") + where


def _told(asked: Decision, predicted: Prediction) -> tuple[str, str]:
    """The prediction and the answer in words."""
    merged = "merged" if asked.merged else "refused" if asked.attempt else f"returned {asked.error}"
    return _outcome(predicted).strip(" ,"), merged
