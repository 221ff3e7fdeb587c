"""Compiles and records small programs, for what asks this kernel again and again."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from vmatrace.errors import EXIT_CANNOT_TRACE, VmatraceError, escape
from vmatrace.ingest import Trace
from vmatrace.replay import ReplayResult
from vmatrace.replay.shrink import Repeat, Shrunk, shrink

_COMPILER = ("cc", "-O0", "-w", "-o")
_TIMEOUT_S = 300


def shrunk(trace: Trace, result: ReplayResult) -> Shrunk | None:
    """The first divergence of a replay in the fewest steps, by trying on this kernel; None where it does not repeat."""
    with tempfile.TemporaryDirectory(prefix="vmatrace-shrink-") as folder:
        return shrink(trace, result, repeater(Path(folder)))


def repeater(folder: Path) -> Repeat:
    """What `vmatrace.replay.shrink` wants: programs and traces go to ``folder``, one after the other.

    Raises VmatraceError where there is no compiler, or where nothing can be traced.
    """
    numbers = count()

    def repeat(text: str) -> tuple[Path, str]:
        base = folder / f"round-{next(numbers)}"
        source, program, trace = base.with_suffix(".c"), base, base.with_suffix(".vmat")
        source.write_text(text, encoding="utf-8")
        _run("cc", [*_COMPILER, str(program), str(source)], "install a C compiler (apt install gcc)")
        words = [sys.executable, "-m", "vmatrace", "record", "--quiet", "-o", str(trace), "--", str(program)]
        return trace, _run("vmatrace record", words, "`vmatrace doctor` says what can be traced here")

    return repeat


def _run(what: str, words: list[str], hint: str) -> str:
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        said = escape(" ".join(error.stderr.decode(errors="replace").splitlines()[:1]))
        raise VmatraceError(f"shrinking, {what}: {said}", hint, EXIT_CANNOT_TRACE) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VmatraceError(f"shrinking, {what}: {error}", hint, EXIT_CANNOT_TRACE) from error
    return done.stdout.decode(errors="replace")
