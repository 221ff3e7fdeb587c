"""``vmatrace simulate``: a scenario file through the rules alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmatrace.cli import common
from vmatrace.cli.common import Format, FormatOption
from vmatrace.cli.ruleset import WithoutOption, chosen_rules
from vmatrace.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UsageError
from vmatrace.kernel import NAMED, RuleSet, rule_set
from vmatrace.rules.drawing import draw
from vmatrace.scenario import Outcome, Scenario, read_scenarios, run_scenario
from vmatrace.simulator import check_rule_ids

RulesOption = Annotated[
    str | None,
    typer.Option(
        "--rules",
        help="Rule set: a release (6.18) or auto (this kernel's), +feature, -feature; else the scenario's own.",
    ),
]

# What a scenario that names neither a rule set nor the kernel of a release is run under.
_DEFAULT_RULES = "6.18"


def command(
    scenario: Annotated[Path, typer.Argument(help="Scenarios, one JSON object a line.")],
    rules: RulesOption = None,
    without: WithoutOption = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Run the other lines after a bad one.")] = False,
    format: FormatOption = Format.table,
) -> int:
    """Run each scenario through the rules and compare the outcome with what it expects."""
    chosen = None if rules is None else chosen_rules(rules)
    disabled = frozenset(without or ())
    check_rule_ids(disabled)
    outcomes: list[tuple[Scenario, Outcome]] = []
    bad = 0
    for item in read_scenarios(scenario):
        try:
            if isinstance(item, UsageError):
                raise item
            own = chosen or _own_rules(item)
            outcomes += [(item, outcome) for outcome in run_scenario(item, own, disabled)]
        except UsageError as error:
            if not keep_going:
                raise
            common.print_error(error.message, error.hint)
            bad += 1
    if not outcomes and not bad:
        raise UsageError(f"{scenario}: no scenario in it", "one JSON object a line; see `vmatrace simulate --help`")
    _print(outcomes, format)
    failed = sum(outcome.agrees is False for _, outcome in outcomes)
    which = f"rules {chosen.name} ({chosen.label})" if chosen else "the rules or the release that each scenario names"
    common.note(f"{len(outcomes)} operations by {which}: {failed} disagree")
    return EXIT_USAGE if bad else EXIT_FAILED if failed else EXIT_OK


def _own_rules(scenario: Scenario) -> RuleSet:
    """The first rule set that it names, else that of the release its kernel grew from (no backports of it)."""
    release = ".".join(scenario.kernel.split(".")[:2])
    default = release if release in NAMED else _DEFAULT_RULES
    try:
        return rule_set(scenario.rules[0] if scenario.rules else default)
    except UsageError as error:
        raise UsageError(f"{scenario.where}: {error.message}", error.hint) from error


def _print(outcomes: list[tuple[Scenario, Outcome]], format: Format) -> None:
    if format is Format.json:
        common.print_json({"schema": 1, "results": [outcome.as_json() for _, outcome in outcomes]})
    elif format is Format.csv:
        columns = ("name", "outcome", "errno", "agrees", "rules")
        common.print_csv(columns, (outcome.as_json() for _, outcome in outcomes))
    else:
        _print_text(outcomes)


def _print_text(outcomes: list[tuple[Scenario, Outcome]]) -> None:
    console = common.stdout_console()
    few = len(outcomes) <= 20
    for scenario, outcome in outcomes:
        verdict = {True: "agrees", False: "DISAGREES", None: ""}[outcome.agrees]
        errno = f" {outcome.errno}" if outcome.errno else ""
        console.print(f"{outcome.name}: {outcome.outcome}{errno} {verdict}".rstrip())
        if few or outcome.agrees is False:
            for line in draw([("before", outcome.before), ("after", outcome.vmas)], scenario.limits.shift):
                console.print("    " + line)
            for difference in outcome.differences:
                console.print("    " + difference)
            if outcome.rules:
                console.print("    rules: " + ", ".join(outcome.rules))
