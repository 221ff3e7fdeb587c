"""What kept mappings apart, summed up: each condition, how often it refused, and what would take it away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vmatrace.errors import escape

_HEAD: Final = ("refused", "alone", "condition", "what would take it away")
_NUMBER: Final = re.compile(r"\b0x[0-9a-f]+|\b\d+\b")


class RefusalSummary:
    """Counts the conditions of refused merges, event by event.

    ``refused``: on how many sides of how many mappings a condition stood in the way; ``alone``: where it was the only
    one, so that taking it away would have merged the two.
    """

    def __init__(self) -> None:
        self._refused: Counter[tuple[str, str, str]] = Counter()
        self._alone: Counter[tuple[str, str, str]] = Counter()

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in an event of `iter_events`; one without reasons counts for nothing."""
        by_side: dict[str, list[tuple[str, str, str]]] = {}
        for reason in event["reasons"] or ():
            text, remedy = (_NUMBER.sub("N", reason[name]) for name in ("text", "remedy"))
            by_side.setdefault(reason["side"], []).append((reason["rule"], text, remedy))
        for conditions in by_side.values():
            self._refused.update(conditions)
            if len(conditions) == 1:
                self._alone.update(conditions)

    def lines(self) -> Iterator[str]:
        """A head line and a line for each condition, the one that refused most first; nothing where none did."""
        if not self._refused:
            return
        cells = [_HEAD]
        for condition, times in self._refused.most_common():
            rule, text, remedy = condition
            cited = f"{text} [{rule}]" if rule else text
            cells.append((str(times), str(self._alone[condition]), escape(cited), escape(remedy)))
        width = [max(len(row[column]) for row in cells) for column in range(3)]
        for count, alone, text, remedy in cells:
            yield f"{count:>{width[0]}}  {alone:>{width[1]}}  {text:<{width[2]}}  {remedy}".rstrip()
