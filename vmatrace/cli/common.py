"""What all commands share: the two consoles, the output formats, how an error looks.

stdout carries the result, stderr everything else; neither has colour or wrapping when it is no terminal.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from vmatrace.errors import escape

if TYPE_CHECKING:
    from rich.console import Console

# A pipe has no width: rows must stay one line each, however long a path is.
_PIPE_WIDTH = 4096

_verbosity = 0


class Format(StrEnum):
    """How a result is written to stdout."""

    table = "table"
    json = "json"
    csv = "csv"


FormatOption = Annotated[Format, typer.Option("--format", "-f", help="How the result is written.")]


def set_verbosity(level: int) -> None:
    """Set how much is said on stderr: 0 normal, 1 more, 2 with tracebacks."""
    global _verbosity
    _verbosity = level


def verbosity() -> int:
    """How often -v was given."""
    return _verbosity


def stdout_console() -> Console:
    """Make a rich console for results."""
    return _console(sys.stdout)


def stderr_console() -> Console:
    """Make a rich console for progress, warnings and hints."""
    return _console(sys.stderr)


def print_json(value: object) -> None:
    """Write ``value`` to stdout as one JSON document.

    Text that is not valid Unicode (names from the system) comes out as escapes, never as broken UTF-8.
    """
    json.dump(value, sys.stdout, default=_plain_value)
    sys.stdout.write("\n")


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to stdout as CSV with a header line; control characters in text are escaped."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_csv_cell(row.get(column)) for column in columns])


def print_error(message: str, hint: str = "") -> None:
    """Write ``error: message`` and, below it, ``hint: hint`` to stderr."""
    note("error: " + message)
    if hint:
        note("hint: " + hint)


def print_warning(message: str) -> None:
    """Write ``warning: message`` to stderr."""
    note("warning: " + message)


def print_next(command: str) -> None:
    """Tell on stderr which command to type next."""
    note("next: " + command)


def note(text: str) -> None:
    """Write one line to stderr, control characters escaped; a closed stderr is no reason to fail."""
    try:
        sys.stderr.write(escape(text) + "\n")
        sys.stderr.flush()
    except OSError:
        return


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return Console(
        file=stream,
        force_terminal=terminal,
        no_color=not terminal or bool(os.environ.get("NO_COLOR")),
        width=None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _csv_cell(value: object) -> object:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list | tuple | set | frozenset):
        return " ".join(escape(str(item)) for item in value)
    return value


def _plain_value(value: Any) -> object:
    """Turn NumPy scalars and sets, which json does not know, into what it does know."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")
