"""Power: each rule switched off must change the verdict of a committed scenario or trace.

``python -m tests.conformance.power`` prints what catches each rule. Scenarios whose outcome we derived ourselves
do not count; a trace counts where a rule that is off makes an operation FAILED.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmatrace.errors import UsageError
from vmatrace.ingest import Trace
from vmatrace.kernel import rule_set
from vmatrace.replay import run
from vmatrace.scenario import Scenario, read_scenarios, run_scenario
from vmatrace.simulator import RULES

TESTS = Path(__file__).resolve().parents[1]
SCENARIOS = tuple(sorted((TESTS / "scenarios").glob("*.jsonl")))
# Each rule that no scenario catches costs at most one replay of each.
TRACES = tuple(sorted((TESTS / "data").rglob("*.vmat")))


@dataclass(frozen=True, slots=True)
class Catch:
    """What catches a rule: a file, and a scenario's name or an operation of a trace in it."""

    rule: str
    file: str
    where: str


def by_scenarios(paths: Iterable[Path]) -> dict[str, Catch]:
    """The first scenario that catches each rule."""
    found: dict[str, Catch] = {}
    for path in paths:
        for scenario in read_scenarios(path):
            if isinstance(scenario, Scenario) and scenario.source != "derived":
                for id in _caught(scenario, set(found)):
                    found[id] = Catch(id, path.name, scenario.name)
    return found


def _caught(scenario: Scenario, known: set[str]) -> Iterator[str]:
    for name in scenario.rules:
        rules = rule_set(name)
        decided = {id for outcome in run_scenario(scenario, rules) for id in outcome.rules}
        for id in decided - known:
            try:
                outcomes = run_scenario(scenario, rules, {id})
            except UsageError:  # the model cannot go on without the rule
                yield id
                continue
            if any(outcome.agrees is False for outcome in outcomes):
                yield id


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def by_traces(paths: Iterable[Path], wanted: Iterable[str]) -> dict[str, Catch]:
    """The first trace that catches each of the rules ``wanted``."""
    found: dict[str, Catch] = {}
    for path in paths:
        good = run(Trace(path))
        decided = {id for verdict in good for id in verdict.rules}
        for id in set(wanted) & decided - set(found):
            known = {(verdict.space, verdict.op) for verdict in good.failed}
            failed = [v for v in run(Trace(path), without=(id,)).failed if (v.space, v.op) not in known]
            if failed:
                found[id] = Catch(id, _name(path), f"operation {failed[0].op}, {failed[0].syscall}")
    return found


def power() -> tuple[dict[str, Catch], list[str]]:
    """What catches each observable rule, and the rules that nothing catches."""
    observable = [rule.id for rule in RULES.values() if not rule.unobservable]
    found = by_scenarios(SCENARIOS)
    found |= by_traces(TRACES, [id for id in observable if id not in found])
    return found, [id for id in observable if id not in found]


def main() -> int:
    """Print the table; exit 1 where a rule is not caught."""
    found, missed = power()
    for rule in RULES.values():
        catch = found.get(rule.id)
        where = f"{catch.file}: {catch.where}" if catch else "unobservable" if rule.unobservable else "NOT CAUGHT"
        print(f"{rule.id:<32} {where}")
    observable = sum(not rule.unobservable for rule in RULES.values())
    print(f"{observable - len(missed)} of {observable} observable rules caught, {len(RULES)} rules in all")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
