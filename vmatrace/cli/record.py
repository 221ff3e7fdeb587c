"""``vmatrace record``: capture what happens to address spaces, into a trace file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from signal import SIGINT
from typing import Annotated

import typer

from vmatrace.cli import common
from vmatrace.errors import UsageError, VmatraceError

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_FAILED_BEFORE_COMMAND = 125
_LAYERS = ("auto", "operations", "decisions")


def command(
    words: Annotated[list[str] | None, typer.Argument(metavar="-- CMD [ARGS]...", help="The command to trace.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Trace file; default: named after the command or PID."),
    ] = None,
    pids: Annotated[list[int] | None, typer.Option("--pid", "-p", help="A running process; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every process but this one.")] = False,
    user: Annotated[str | None, typer.Option("--user", "-u", help="Run CMD as this user.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.0, help="Stop recording after so many seconds.")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite the trace file.")] = False,
    stacks: Annotated[bool, typer.Option("--stacks", help="Keep the user stack of each call, for `show`.")] = False,
    layer: Annotated[str, typer.Option(help="auto, operations or decisions.")] = "auto",
    max_size: Annotated[str | None, typer.Option(help="Stop when the trace is this big: 500M, 2G.")] = None,
    buffer: Annotated[str, typer.Option(help="Size of the ring buffer, a power of two: 16M.")] = "16M",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and warnings.")] = False,
) -> int:
    """Trace a command (and its children), running processes, or all, until it ends or Ctrl-C."""
    from vmatrace.capture.session import record
    from vmatrace.capture.wanted import Wanted

    asked = tuple(words or ())
    if user and not asked:
        raise UsageError("--user: is for a command", "vmatrace record -u USER -- CMD")
    if layer not in _LAYERS:
        raise UsageError(f"--layer {layer}: not known", "use " + ", ".join(_LAYERS))
    wanted = Wanted(
        output=output or _default_name(asked, tuple(pids or ())),
        command=asked,
        pids=tuple(pids or ()),
        everything=everything,
        user=user,
        duration=duration,
        force=force,
        max_size=_bytes(max_size) if max_size else None,
        ring_bytes=_ring(buffer),
        max_spaces=8192 if everything else 1024,
        layer=layer,
        stacks=stacks,
    )

    def say(text: str) -> None:
        if not quiet or text.startswith("warning"):
            common.note(text)

    try:
        outcome = record(wanted, say)
    except VmatraceError as error:
        if asked and error.exit_code not in (126, 127) and not isinstance(error, UsageError):
            error.exit_code = _FAILED_BEFORE_COMMAND
        raise
    except Exception as error:
        if not asked:
            raise
        raise VmatraceError(
            f"internal, vmatrace record: {type(error).__name__}: {error}",
            "this is a fault of vmatrace; run it again with -vv and report what it prints",
            _FAILED_BEFORE_COMMAND,
        ) from error
    for trouble in outcome.trouble:
        say("warning: " + "; ".join(part for part in (trouble.message, trouble.hint) if part))
    if outcome.lost:
        say(f"warning: {outcome.lost} records were lost: what they told is unknown; try a larger --buffer")
    if outcome.alive:
        say(f"alive and left alone: PID {' '.join(map(str, outcome.alive))}")
    say(f"{outcome.reason}: {outcome.records} records, {outcome.lost} lost, {outcome.written} bytes")
    say(f"wrote {outcome.path}")
    if outcome.path.is_file():
        say(f"next: vmatrace replay {shlex.quote(str(outcome.path))}")
    if outcome.signal and (asked or outcome.signal != SIGINT):
        return 128 + outcome.signal  # without a command, Ctrl-C is how a recording is ended
    return outcome.status


def _default_name(asked: tuple[str, ...], pids: tuple[int, ...]) -> Path:
    stem = Path(asked[0]).name if asked else "-".join(map(str, pids[:3])) or "all"
    return Path(re.sub(r"[^A-Za-z0-9._-]", "_", stem)[:64] + ".vmat")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"size {text!r}: not understood", "write it like 500M or 2G")
    return int(match[1]) * _SIZES[match[2].upper()]


def _ring(text: str) -> int:
    size = _bytes(text)
    if size < 1 << 16 or size & (size - 1) or size > 1 << 30:
        raise UsageError(f"--buffer {text}: not a power of two from 64K to 1G", "use 16M")
    return size
