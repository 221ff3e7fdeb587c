"""The one family of errors that a user may see: a message, one hint, an exit status.

Nothing here prints or exits; the command line catches `VmatraceError` once and shows it.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CANNOT_TRACE = 3
EXIT_BAD_TRACE = 4

# Line, paragraph and text-direction marks reorder or break a terminal line, like control characters do.
_HOSTILE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class VmatraceError(Exception):
    """Something the user can act on.

    ``message`` says what and where and why; ``hint`` names one thing to do next (may be empty);
    ``exit_code`` is the status of the command that ends with this error.
    """

    default_exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "", exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = self.default_exit_code if exit_code is None else exit_code

    def __str__(self) -> str:
        return self.message


class UsageError(VmatraceError):
    """The command or a value given to it is wrong (exit 2)."""

    default_exit_code = EXIT_USAGE


class CannotTrace(VmatraceError):
    """Tracing is not possible here, or not permitted (exit 3)."""

    default_exit_code = EXIT_CANNOT_TRACE


class BadTrace(VmatraceError):
    """A trace, BTF blob or other input file is unusable (exit 4)."""

    default_exit_code = EXIT_BAD_TRACE


def escape(text: str) -> str:
    r"""Text from the system made safe to print: each control character becomes ``\ooo`` as in /proc.

    Undecodable bytes (surrogate escapes) and direction or line marks are escaped too, so a file name
    can neither move the cursor nor forge a line. Everything else stays as it is.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_octal(c) if unicodedata.category(c) in _HOSTILE_CATEGORIES else c for c in text)


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The known words closest to ``word``, as ``a, b or c``; empty text where nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    if len(found) < 2:
        return "".join(found)
    return ", ".join(found[:-1]) + " or " + found[-1]


def _octal(char: str) -> str:
    try:
        raw = char.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = char.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in raw)
