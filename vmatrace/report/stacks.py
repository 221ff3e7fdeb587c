"""User stacks as lines of text, below what they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmatrace.errors import escape
from vmatrace.timeline import Frame


def stack_lines(stack: Sequence[Frame] | None) -> Iterator[str]:
    """A frame on each line, innermost first; nothing where there is no stack, a word where it was lost."""
    if stack is None:
        return
    if not stack:
        yield "                 (its stack was lost)"
    for frame in stack:
        place = f"{frame.file}+{frame.offset:#x}" if frame.file is not None else ""
        where = f"{frame.symbol} ({frame.file})" if frame.symbol else place or f"{frame.address:#x}"
        yield f"                 {escape(where)}"
