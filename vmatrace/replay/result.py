"""What a replay hands out: one verdict an operation, and their sums as one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from vmatrace.errors import EXIT_BAD_TRACE, EXIT_FAILED, EXIT_OK
from vmatrace.ingest.effects import EFFECTS
from vmatrace.kernel import RuleSet
from vmatrace.replay.attempts import Refusal
from vmatrace.replay.divergence import text_lines
from vmatrace.vma import Vma

PASSED: Final = "passed"
FAILED: Final = "failed"
UNDECIDED: Final = "undecided"
SKIPPED: Final = "skipped"
INPUT: Final = "inputs"
AGREEMENT: Final = "agreement"
"""The kind of decision verdict that says whether both layers tell the same of an operation."""
VERDICTS: Final = (PASSED, FAILED, UNDECIDED, SKIPPED, INPUT)


class Verdict(NamedTuple):
    """The verdict of one operation.

    ``op`` counts the operations of its address space ``space``, -1: between operations. ``order`` is its
    place among all records. ``rules``: those that decided, in order. ``expected``, ``observed`` and ``call``
    are texts, for a FAILED one.
    """

    space: int
    pid: int
    op: int
    syscall: str
    verdict: str
    reason: str = ""
    rules: tuple[str, ...] = ()
    #: Counts by `vmatrace.ingest.effects.EFFECTS`.
    counts: tuple[int, ...] = ()
    changed: bool = False
    expected: str = ""
    observed: str = ""
    call: str = ""
    tid: int = 0
    order: int = 0
    #: FAILED: what was there before, what was expected and what was seen, each by its label.
    layouts: tuple[tuple[str, tuple[Vma, ...]], ...] = ()

    @property
    def effects(self) -> dict[str, int]:
        """How many of each effect, as observed; those that were not are left out."""
        return {name: count for name, count in zip(EFFECTS, self.counts, strict=False) if count}

    @property
    def rule(self) -> str:
        """The last rule that decided, or nothing."""
        return self.rules[-1] if self.rules else ""

    def divergence(self, commits: Mapping[str, str], page_size: int) -> dict[str, Any]:
        """The JSON form of a FAILED verdict."""
        return {
            "op": self.op,
            "pid": self.pid,
            "space": self.space,
            "syscall": self.syscall,
            "call": self.call,
            "rule": self.rule,
            "rules": list(self.rules),
            "commit": commits.get(self.rule),
            "expected": self.expected,
            "observed": self.observed,
            "text": "\n".join(text_lines(self, page_size)),
        }


class DecisionVerdict(NamedTuple):
    """The verdict of one decision, or (``what`` is AGREEMENT) of both layers about one operation.

    ``op``: its operation in ``space``, -1: none; ``place``: its index among all records. ``merged``: None where
    it is no merge attempt. ``refusals``: every condition that refused it.
    """

    space: int
    pid: int
    tid: int
    op: int
    syscall: str
    what: str
    function: str
    verdict: str
    reason: str
    rules: tuple[str, ...] = ()
    merged: bool | None = None
    refusals: tuple[Refusal, ...] = ()
    expected: str = ""
    observed: str = ""
    start: int = 0
    end: int = 0
    time: int = 0
    place: int = 0

    @property
    def rule(self) -> str:
        """The last rule that decided, or nothing."""
        return self.rules[-1] if self.rules else ""

    def divergence(self, commits: Mapping[str, str]) -> dict[str, Any]:
        """The JSON form of a FAILED verdict."""
        return {
            "op": self.op,
            "pid": self.pid,
            "space": self.space,
            "syscall": self.syscall,
            "decision": self.what,
            "function": self.function,
            "rule": self.rule,
            "rules": list(self.rules),
            "commit": commits.get(self.rule),
            "expected": self.expected,
            "observed": self.observed,
            "text": f"{self.what} ({self.function}): {self.reason}" if self.function else self.reason,
        }


@dataclass(slots=True)
class ReplayResult:
    """All verdicts of a trace, in the order in which the operations were judged."""

    trace: dict[str, Any]
    rules: RuleSet
    verdicts: list[Verdict]
    effects: dict[str, int]
    lost_records: int
    dropped: int = 0
    merges_refused: int = 0
    without: tuple[str, ...] = ()
    #: The verdicts of the decisions layer, in the order of the operations.
    decisions: list[DecisionVerdict] = field(default_factory=list)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def count(self, verdict: str) -> int:
        """How many operations have a verdict."""
        return sum(v.verdict == verdict for v in self.verdicts)

    @property
    def failed(self) -> list[Verdict]:
        """The FAILED verdicts."""
        return [v for v in self.verdicts if v.verdict == FAILED]

    @property
    def failed_decisions(self) -> list[DecisionVerdict]:
        """The FAILED verdicts of decisions, and of the two layers' agreement."""
        return [v for v in self.decisions if v.verdict == FAILED]

    def status(self, strict: bool = False) -> int:
        """The exit status: 0 all that could be decided holds, 1 something FAILED, 4 nothing was decided."""
        counts = Counter(v.verdict for v in self.verdicts)
        decisions = Counter(v.verdict for v in self.decisions)
        if counts[FAILED] or decisions[FAILED] or (strict and counts[UNDECIDED] + decisions[UNDECIDED]):
            return EXIT_FAILED
        return EXIT_OK if counts[PASSED] else EXIT_BAD_TRACE

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``vmatrace replay --format json``."""
        counts = Counter(v.verdict for v in self.verdicts)
        changing = [v for v in self.verdicts if v.changed]
        by_syscall: dict[str, Counter[str]] = {}
        for verdict in self.verdicts:
            by_syscall.setdefault(verdict.syscall, Counter())[verdict.verdict] += 1
        commits = self.commits()
        return {
            "schema": 1,
            "trace": self.trace,
            "rules": {
                "name": self.rules.name,
                "label": self.rules.label,
                "fitted": sorted(self.rules.fitted),
                "without": list(self.without),
                "features": dict(self.rules.features),
            },
            "operations": len(self.verdicts),
            "changing": len(changing),
            **{name: counts[name] for name in VERDICTS},
            "changing_passed": sum(v.verdict == PASSED for v in changing),
            "changing_open": sum(v.verdict in (UNDECIDED, SKIPPED) for v in changing),
            "unchanged": len(self.verdicts) - len(changing),
            "merges_refused": self.merges_refused,
            "dropped": self.dropped,
            "lost_records": self.lost_records,
            "by_syscall": {name: dict(by_syscall[name]) for name in sorted(by_syscall)},
            "effects": self.effects,
            "decisions": decision_sums(self.decisions) if "decisions" in self.trace["layers"] else {},
            "undecided_reasons": self.reasons(UNDECIDED),
            "skipped_reasons": self.reasons(SKIPPED),
            "divergences": [
                *(v.divergence(commits, int(self.trace["page_size"])) for v in self.failed),
                *(v.divergence(commits) for v in self.failed_decisions),
            ],
        }

    def reasons(self, verdict: str) -> dict[str, int]:
        """How often each reason stands behind a verdict, the most frequent first."""
        return dict(Counter(v.reason for v in self.verdicts if v.verdict == verdict).most_common())

    def commits(self) -> dict[str, str]:
        """The commit of each rule that has one, by its id."""
        from vmatrace.simulator import RULES

        return {id: str(rule.commit) for id, rule in RULES.items() if rule.commit is not None}


def decision_sums(verdicts: Sequence[DecisionVerdict]) -> dict[str, Any]:
    """The JSON object ``decisions``: how many of each kind, and how many of each verdict."""
    attempts = [v for v in verdicts if v.merged is not None]
    agreed = sum(v.what == AGREEMENT and v.verdict == PASSED for v in verdicts)
    kinds, judged = Counter(v.what for v in verdicts), Counter(v.verdict for v in verdicts)
    return {
        "merge_attempt": len(attempts),
        "merge_refused": sum(not v.merged for v in attempts),
        "split": kinds["SPLIT"],
        "mmap_prepare": kinds["MMAP_PREPARE"],
        "compat_mmap": kinds["COMPAT_MMAP"],
        "agreed": agreed,
        "passed": judged[PASSED] - agreed,
        "failed": judged[FAILED],
        "undecided": judged[UNDECIDED],
        "by_kind": dict(sorted(kinds.items())),
        "undecided_reasons": dict(Counter(v.reason for v in verdicts if v.verdict == UNDECIDED).most_common()),
    }
