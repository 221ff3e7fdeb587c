"""Counts what a replayed trace covered: verdicts, call x outcome as observed, how often each rule decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmatrace.ingest import Trace, errno_name
from vmatrace.replay import FAILED, PASSED, UNDECIDED, Verdict, run

# Kinds of operation that no rule predicts: they start or end the model.
_NOT_JUDGED = frozenset(("exec", "exit", "section"))


@dataclass(slots=True)
class Tally:
    """Sums over traces. ``outcomes`` counts PASSED operations by (call, outcome); ``failures`` are texts."""

    operations: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    undecided: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost_records: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in another tally."""
        self.operations += other.operations
        self.verdicts += other.verdicts
        self.outcomes += other.outcomes
        self.rules += other.rules
        self.undecided += other.undecided
        self.lost_records += other.lost_records
        self.failures += other.failures

    @property
    def failed(self) -> int:
        """How many operations (and idle sections) FAILED."""
        return self.verdicts[FAILED]

    @property
    def undecided_share(self) -> float:
        """UNDECIDED per operation judged."""
        return self.verdicts[UNDECIDED] / max(1, self.operations)


def tally(path: Path, rules: str = "auto") -> Tally:
    """Replay a trace and count."""
    trace = Trace(path)
    result = run(trace, rules)
    found = Tally(lost_records=trace.lost_records)
    for verdict in result.verdicts:
        found.verdicts[verdict.verdict] += 1
        found.operations += verdict.syscall not in _NOT_JUDGED
        found.rules.update(verdict.rules)
        if verdict.verdict == PASSED and verdict.op >= 0:
            found.outcomes.update((verdict.syscall, word) for word in outcomes(trace, verdict))
        elif verdict.verdict == UNDECIDED:
            found.undecided[verdict.syscall, verdict.reason] += 1
        elif verdict.verdict == FAILED:
            found.failures.append(f"space {verdict.space} op {verdict.op}: {verdict.syscall}: {verdict.reason}")
    trace.close()
    return found


def outcomes(trace: Trace, verdict: Verdict) -> Iterator[str]:
    """The words for what an operation did as observed: merge sides, split, unmap, new, errno, or none."""
    row = trace.operation_row(verdict.space, verdict.op)
    table = trace.operations
    errno = None
    if table.call[row] >= 0:
        errno = errno_name(int(trace.records.calls["result"][table.call[row]]))
    if errno is not None:
        yield errno
    some = errno is not None
    for name in ("split", "unmap", "new", "copy", "grow"):
        if table.effects[name][row]:
            yield name
            some = True
    if table.effects["merge"][row]:
        for side in {effect.side for effect in trace.operation(row).detail if effect.kind == "merge"}:
            yield f"merge {side or 'unknown'}"
        some = True
    if not some:
        yield "in place" if table.changed[row] else "none"
