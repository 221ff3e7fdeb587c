"""``vmatrace rules``: the rules, their commits, and the features that switch them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vmatrace.cli import common
from vmatrace.cli.common import Format, FormatOption
from vmatrace.cli.ruleset import chosen_rules
from vmatrace.errors import EXIT_OK
from vmatrace.kernel import RuleSet
from vmatrace.simulator import RULES, Rule, check_rule_ids

_COLUMNS = (
    "id",
    "kernel_function",
    "sentence",
    "feature",
    "until",
    "commit",
    "unobservable",
    "module",
    "in_force",
)


def command(
    id: Annotated[
        str | None, typer.Argument(help="A rule, a function or a commit of the kernel; all rules without it.")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option("--rules", help="Only the rules in force under this rule set (auto: on this kernel)."),
    ] = None,
    format: FormatOption = Format.table,
) -> int:
    """List the rules that the simulator knows, each with the kernel function it states."""
    chosen = None if rules is None else chosen_rules(rules)
    found = list(RULES.values())
    if id is not None:
        found = [rule for rule in found if rule.id == id] or [rule for rule in found if _is_named(rule, id)]
        if not found:
            check_rule_ids([id])
    if chosen is not None:
        found = [rule for rule in found if rule.stands(chosen)]
    rows = [_row(rule, chosen) for rule in sorted(found, key=lambda rule: (rule.module, rule.id))]
    if format is Format.json:
        common.print_json({"schema": 1, "rules": rows})
    elif format is Format.csv:
        common.print_csv(_COLUMNS, rows)
    else:
        _print_text(rows, detailed=id is not None)
    return EXIT_OK


def _is_named(rule: Rule, name: str) -> bool:
    """Whether ``name`` is a kernel function that the rule states, or its commit (seven digits or more of it)."""
    functions = (word.split(" ")[0] for word in rule.kernel_function.split(", "))
    cited = rule.commit.id if rule.commit else ""
    return name in functions or (len(name) >= 7 and bool(cited) and name.startswith(cited[: len(name)]))


def _row(rule: Rule, chosen: RuleSet | None) -> dict[str, Any]:
    return {
        "id": rule.id,
        "kernel_function": rule.kernel_function,
        "sentence": rule.sentence,
        "feature": rule.feature,
        "until": rule.until,
        "commit": str(rule.commit) if rule.commit else None,
        "unobservable": rule.unobservable,
        "module": rule.module,
        "in_force": None if chosen is None else rule.stands(chosen),
    }


def _print_text(rows: list[dict[str, Any]], detailed: bool) -> None:
    console = common.stdout_console()
    for row in rows:
        switch = f" [with {row['feature']}]" if row["feature"] else ""
        switch += f" [until {row['until']}]" if row["until"] else ""
        hidden = " (unobservable)" if row["unobservable"] else ""
        console.print(f"{row['id']}{switch}{hidden}")
        console.print(f"    {row['sentence']}")
        console.print(f"    {row['kernel_function']}")
        if row["commit"]:
            console.print(f"    {row['commit']}")
        if detailed:
            console.print(f"    {row['module']}")
