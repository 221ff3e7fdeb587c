"""``vmatrace replay``: did the kernel keep to its rules? A verdict for each operation of a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmatrace.cli import common
from vmatrace.cli.common import Format, FormatOption
from vmatrace.cli.repeat import shrunk
from vmatrace.cli.ruleset import WithoutOption
from vmatrace.errors import EXIT_BAD_TRACE, EXIT_FAILED, EXIT_OK, BadTrace, UsageError
from vmatrace.ingest import Trace
from vmatrace.replay import ReplayResult, run
from vmatrace.replay.reproducer import first_reproducer
from vmatrace.replay.shrink import Shrunk
from vmatrace.report.verdicts import VERDICT_COLUMNS, divergence_lines, summary_lines, verdict_row

RulesOption = Annotated[
    str,
    typer.Option("--rules", help="Rule set: auto (as in the trace) or a release, +feature, -feature."),
]


def command(
    traces: Annotated[
        list[Path], typer.Argument(help="Files that `vmatrace record` wrote.", metavar="TRACE...", readable=False)
    ],
    rules: RulesOption = "auto",
    without: WithoutOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for UNDECIDED operations too.")] = False,
    reproducer: Annotated[
        Path | None,
        typer.Option("--reproducer", help="Write a C program that repeats the first divergence.", metavar="FILE.c"),
    ] = None,
    shrink: Annotated[
        Path | None,
        typer.Option(
            "--shrink",
            help="Find the fewest calls that repeat the first divergence on this kernel (root, a C compiler); write "
            "them as a scenario, and as FILE.c.",
            metavar="FILE.jsonl",
        ),
    ] = None,
    format: FormatOption = Format.table,
) -> int:
    """Predict each operation by the rules, compare it with what the kernel did, and say where they differ."""
    results, statuses, program, smallest = [], [], "", None
    for path in traces:
        try:
            opened = Trace(path)
        except BadTrace as error:
            common.print_error(error.message, error.hint)
            statuses.append(error.exit_code)
            continue
        if opened.warning:
            common.print_warning(f"{path}: {opened.warning}")
        results.append(run(opened, rules, tuple(without or ())))
        statuses.append(results[-1].status(strict))
        if reproducer is not None and not program:
            program = first_reproducer(opened, results[-1])
        if shrink is not None and smallest is None and results[-1].failed:
            smallest = shrunk(opened, results[-1])
    if results:
        _print(results, format, many=len(traces) > 1)
    if reproducer is not None:
        _write(program, reproducer)
    if shrink is not None:
        _write_shrunk(smallest, shrink)
    for result in results:
        if result.lost_records:
            common.print_warning(f"{result.trace['path']}: {result.lost_records} records were lost")
        if not result.count("passed") and not result.failed:
            common.print_warning(f"{result.trace['path']}: nothing decided")
    return worst(statuses)


def _write(program: str, path: Path) -> None:
    if not program:
        common.print_warning(f"{path}: not written: nothing diverged that a program could repeat")
        return
    _put(path, program)
    common.print_next(f"gcc -Wall -o reproducer {path} && ./reproducer")


def _write_shrunk(smallest: Shrunk | None, path: Path) -> None:
    if smallest is None:
        common.print_warning(f"{path}: not written: nothing diverged that this kernel repeats")
        return
    program = path.with_suffix(".c")
    _put(path, smallest.scenario + "\n")
    _put(program, smallest.program)
    common.note(f"{smallest.steps} steps repeat: {smallest.verdict.call}: {smallest.verdict.reason}")
    common.print_next(f"vmatrace simulate {path}; gcc -Wall -o reproducer {program} && ./reproducer")


def _put(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "name a file that can be written") from error
    common.note(f"wrote {path}")


def worst(statuses: list[int]) -> int:
    """The exit status of several traces: a FAILED one counts most, then one in which nothing was decided."""
    for status in (EXIT_FAILED, EXIT_BAD_TRACE):
        if status in statuses:
            return status
    return EXIT_OK


def _print(results: list[ReplayResult], format: Format, *, many: bool) -> None:
    if format is Format.json:
        objects = [result.to_json() for result in results]
        common.print_json({"schema": 1, "traces": objects} if many else objects[0])
    elif format is Format.csv:
        rows = ({"trace": r.trace["path"], **verdict_row(v)} for r in results for v in r)
        common.print_csv(("trace", *VERDICT_COLUMNS), rows)
    else:
        for number, result in enumerate(results):
            if number:
                print()
            for line in (*summary_lines(result), *divergence_lines(result)):
                print(line)
