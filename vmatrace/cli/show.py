"""``vmatrace show``: the events of a trace, a line each; with --addr, the history of one address."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from vmatrace.cli import common
from vmatrace.cli.common import Format, FormatOption
from vmatrace.errors import EXIT_OK, UsageError
from vmatrace.ingest import Trace
from vmatrace.replay import Refusals
from vmatrace.report.adoption import adoption_lines
from vmatrace.report.events import Older, render_event
from vmatrace.report.refusals import RefusalSummary
from vmatrace.report.stacks import stack_lines
from vmatrace.timeline import NamedStacks, adoption, event_columns, iter_events

_ATTEMPTS = frozenset(("merge_attempt", "merge_refused"))


def command(
    trace: Annotated[Path, typer.Argument(help="A file that `vmatrace record` wrote.", readable=False)],
    pid: Annotated[int | None, typer.Option("--pid", "-p", help="Only this process.")] = None,
    addr: Annotated[
        str | None, typer.Option("--addr", help="What happened at this address (hex with 0x, or decimal).")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="Only these kinds, with commas: merge split unmap new copy grow change mmap_prepare compat_mmap "
            "merge_attempt merge_refused anon_vma fork exec exit error other call.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=0, help="Stop after so many.")] = None,
    format: FormatOption = Format.table,
) -> int:
    """Show what happened in a trace: each merge, split, new or removed mapping, with the call that did it."""
    opened = Trace(trace)
    if opened.warning:
        common.print_warning(f"{trace}: {opened.warning}")
    kinds = [word for word in (kind or "").replace(" ", ",").split(",") if word]
    _check_layer(opened, kinds)
    reasons = Refusals(opened) if _ATTEMPTS.intersection(kinds) else None
    events = itertools.islice(iter_events(opened, pid, kinds, _address(addr), reasons), limit)
    table = adoption(opened, pid) if "mmap_prepare" in kinds else None
    stacks = NamedStacks(opened)
    if format is Format.json:
        extra = {} if table is None else {"adoption": [row.document() for row in table]}
        common.print_json({"schema": 1, "events": [stacks.add_to(event) for event in events], **extra})
    elif format is Format.csv:
        common.print_csv(event_columns(), events)
    else:
        summary, older, told = RefusalSummary(), Older(), (0, -1)
        for event in events:
            print(render_event(event, older))
            if (event["space"], event["op"]) != told:  # once for all events of an operation
                told = event["space"], event["op"]
                for line in stack_lines(stacks.of(*told)):
                    print(line)
            summary.add(event)
        for line in summary.lines():
            print(line)
        for line in adoption_lines(table) if table is not None else ():
            print(line)
    if opened.lost_records:
        common.print_warning(f"{opened.lost_records} records were lost: events are missing")
    return EXIT_OK


def _check_layer(trace: Trace, kinds: list[str]) -> None:
    """Say what a trace without the decisions layer cannot tell."""
    if trace.decisions.present:
        return
    if _ATTEMPTS.intersection(kinds):
        common.print_warning(
            f"{trace.path}: no decisions layer, so refused merges are inferred from the VMAs that stayed neighbours"
        )
    elif "mmap_prepare" in kinds:
        common.print_warning(f"{trace.path}: no decisions layer, so hooks are inferred from the files")


def _address(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        value = int(text, 10 if text.isdecimal() else 16)
    except ValueError:
        raise UsageError(f"{text!r} is no address", "give it in hex, as 0x7f0012345000") from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{text!r} is no address of 64 bits")
    return value
