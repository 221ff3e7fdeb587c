"""Verdicts of a replay as lines of text: the sums, what was undecided and why, each divergence drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vmatrace.errors import escape
from vmatrace.replay import FAILED, SKIPPED, UNDECIDED, ReplayResult, Verdict
from vmatrace.replay.divergence import rule_line, text_lines
from vmatrace.replay.result import DecisionVerdict

_MOST_DIVERGENCES = 20


def summary_lines(result: ReplayResult) -> Iterator[str]:
    """The sums of one trace."""
    found = result.to_json()
    rules = result.rules
    fitted = f", fitted: {' '.join(sorted(rules.fitted))}" if rules.fitted else ""
    without = f", without {' '.join(result.without)}" if result.without else ""
    yield f"{escape(str(result.trace['path']))}: kernel {escape(str(result.trace['kernel']))}"
    yield f"rules {rules.name} ({rules.label}{fitted}{without})"
    yield (
        f"{found['operations']} operations: {found['passed']} passed, {found['failed']} FAILED, "
        f"{found['undecided']} undecided, {found['skipped']} skipped, {found['inputs']} inputs (exec, exit)"
    )
    yield (
        f"{found['changing']} of them changed a VMA: {found['changing_passed']} passed, "
        f"{found['changing_open']} undecided or skipped; {found['merges_refused']} merges refused"
    )
    yield "effects: " + ", ".join(f"{count} {name}" for name, count in result.effects.items() if count)
    yield from _decision_lines(found["decisions"])
    if result.lost_records:
        yield f"{result.lost_records} records were lost"
    yield from _reasons("undecided", result.reasons(UNDECIDED))
    yield from _reasons("skipped", result.reasons(SKIPPED))


def _decision_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The sums of the decisions layer; nothing where the trace has none."""
    if not found:
        return
    yield (
        f"decisions: {found['merge_attempt']} merge attempts, {found['merge_refused']} of them refused, "
        f"{found['split']} splits, {found['mmap_prepare']} mmap_prepare: {found['passed']} passed, "
        f"{found['failed']} FAILED, {found['undecided']} undecided; both layers agree on {found['agreed']} operations"
    )
    yield from _reasons("decisions undecided", found["undecided_reasons"])


def _reasons(label: str, reasons: Mapping[str, int]) -> Iterator[str]:
    if reasons:
        yield f"{label}:"
    for reason, count in reasons.items():
        yield f"  {count:>7}  {escape(reason)}"


def divergence_lines(result: ReplayResult) -> Iterator[str]:
    """Each FAILED operation: what was called, what should have happened and what did, drawn to scale."""
    failed, decisions = result.failed, result.failed_decisions
    for verdict in failed[:_MOST_DIVERGENCES]:
        yield ""
        yield from _one(verdict, int(result.trace["page_size"]))
    for decision in decisions[:_MOST_DIVERGENCES]:
        yield ""
        yield from _one_decision(decision)
    more = max(len(failed) - _MOST_DIVERGENCES, 0) + max(len(decisions) - _MOST_DIVERGENCES, 0)
    if more:
        yield f"... and {more} more; --format json lists all"


def _one(verdict: Verdict, page_size: int) -> Iterator[str]:
    first, *others = text_lines(verdict, page_size)
    yield f"FAILED {where(verdict)}: {escape(first)}"
    yield from (f"  {escape(line)}" for line in others)


def _one_decision(verdict: DecisionVerdict) -> Iterator[str]:
    function = f" ({verdict.function})" if verdict.function else ""
    yield f"FAILED {verdict.what}{function} in {where(verdict)}: {escape(verdict.reason)}"
    yield from (f"  {rule_line(id)}" for id in verdict.rules)
    if verdict.expected:
        yield f"  expected {escape(verdict.expected)}"
    if verdict.observed:
        yield f"  observed {escape(verdict.observed)}"


def where(verdict: Verdict | DecisionVerdict) -> str:
    """Which operation of which process."""
    number = f"operation {verdict.op}" if verdict.op >= 0 else "between operations"
    return f"{number} of process {verdict.pid} (address space {verdict.space})"


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """One line of the CSV form."""
    return {
        "space": verdict.space,
        "pid": verdict.pid,
        "tid": verdict.tid,
        "op": verdict.op,
        "syscall": verdict.syscall,
        "verdict": verdict.verdict,
        "changed": int(verdict.changed),
        "reason": verdict.reason,
        "rules": list(verdict.rules),
        "effects": [f"{name}={count}" for name, count in verdict.effects.items()],
    }


VERDICT_COLUMNS = ("space", "pid", "tid", "op", "syscall", "verdict", "changed", "reason", "rules", "effects")

__all__ = ["FAILED", "VERDICT_COLUMNS", "divergence_lines", "summary_lines", "verdict_row", "where"]
