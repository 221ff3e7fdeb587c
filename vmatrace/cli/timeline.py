"""``vmatrace timeline``: the address space of a process at any moment, or what changed between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vmatrace.cli import common
from vmatrace.cli.common import Format, FormatOption
from vmatrace.errors import EXIT_OK, UsageError
from vmatrace.ingest import Trace
from vmatrace.report.maps import render_difference, render_snapshot
from vmatrace.timeline import (
    Timeline,
    difference,
    difference_document,
    parse_moment,
    snapshot_document,
    timelines,
)
from vmatrace.timeline.moments import Moment

_CSV = (
    "pid", "generation", "start", "end", "flags", "pgoff", "dev", "ino", "path", "anonymous", "close",
    "anon_vma", "forked", "uffd", "policy", "name", "object",
)  # fmt: skip


def command(
    trace: Annotated[Path, typer.Argument(help="A file that `vmatrace record` wrote.", readable=False)],
    pid: Annotated[
        list[int] | None, typer.Option("--pid", "-p", help="The process; the first traced one without it.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="ns since the first record, 1.5s, an ISO time, or end.")
    ] = None,
    op: Annotated[int | None, typer.Option("--op", help="After operation N of the address space.")] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="What changed between two moments (as --at, or op:N)."),
    ] = None,
    generation: Annotated[
        int | None, typer.Option("--generation", help="Which image of the process: each exec begins another.")
    ] = None,
    format: FormatOption = Format.table,
) -> int:
    """Show an address space at any moment of a trace (its last one without --at), or what changed."""
    if sum(choice is not None for choice in (at, op, diff)) > 1:
        raise UsageError("--at, --op and --diff exclude each other", "give one of them")
    opened = Trace(trace)
    if opened.warning:
        common.print_warning(f"{trace}: {opened.warning}")
    pids = pid or [timelines(opened)[0].space.pid]
    if diff is not None:
        moments = (parse_moment(diff[0], opened), parse_moment(diff[1], opened))
        _show_difference(opened, pids, moments, generation, format)
        return EXIT_OK
    moment = Moment(op=op) if op is not None else parse_moment(at or "end", opened)
    found = [(number, _choose(opened, number, moment, generation)) for number in pids]
    shots = [(number, moment.of(timeline)) for number, timeline in found]
    if format is Format.json:
        documents = [snapshot_document(shot, opened, number) for number, shot in shots]
        common.print_json({"schema": 1} | (documents[0] if len(shots) == 1 else {"spaces": documents}))
    elif format is Format.csv:
        rows = [row for number, shot in shots for row in _csv_rows(snapshot_document(shot, opened, number))]
        common.print_csv(_CSV, rows)
    else:
        for number, shot in shots:
            for line in render_snapshot(shot, opened, number):
                print(line)
    return EXIT_OK


def _choose(trace: Trace, pid: int, moment: Moment, generation: int | None) -> Timeline:
    """The generation asked for; else the one alive at that time, else the last."""
    found = timelines(trace, pid)
    if generation is not None:
        if not 1 <= generation <= len(found):
            raise UsageError(f"process {pid} has no generation {generation}", f"it has 1 to {len(found)}")
        return found[generation - 1]
    if moment.time is not None:
        time = trace.records.first_time + moment.time
        born = [timeline for timeline in found if timeline.space.time <= time]
        return born[-1] if born else found[0]
    return found[-1]


def _show_difference(
    trace: Trace, pids: list[int], moments: tuple[Moment, Moment], generation: int | None, format: Format
) -> None:
    if len(pids) > 1:
        raise UsageError("--diff compares two moments of one process", "give one --pid")
    old, new = (moment.of(_choose(trace, pids[0], moment, generation)) for moment in moments)
    found = difference(old, new)
    if format is Format.json:
        head = {"schema": 1, "pid": pids[0], "spaces": [old.space.id, new.space.id]}
        common.print_json(head | difference_document(found, trace))
    elif format is Format.csv:
        document = difference_document(found, trace)
        rows = [{"what": "added"} | _csv_row(vma) for vma in document["added"]]
        rows += [{"what": "removed"} | _csv_row(vma) for vma in document["removed"]]
        for pair in document["changed"]:
            rows += [{"what": side} | _csv_row(pair[side]) for side in ("before", "after")]
        common.print_csv(("what", *_CSV[2:]), rows)
    else:
        for line in render_difference(found, trace):
            print(line)


def _csv_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    head = {"pid": document["pid"], "generation": document["generation"]}
    return [head | _csv_row(vma) for vma in document["vmas"]]


def _csv_row(vma: dict[str, Any]) -> dict[str, Any]:
    return vma | (vma["file"] or {})
