"""How files were mapped, by file system or driver, as a table of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmatrace.errors import escape
from vmatrace.timeline import Adoption

_HEAD = ("file system or driver", "maps", "mmap_prepare", "->mmap", "compat", "merged", "hooks and what they changed")


def adoption_lines(rows: Sequence[Adoption]) -> Iterator[str]:
    """A head line and a line for each file system or driver."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD) - 1)]
    for line in cells:
        first, *numbers = line[:-1]
        right = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join((f"{first:<{widths[0]}}", *right, line[-1])).rstrip()


def _cells(row: Adoption) -> tuple[str, ...]:
    changes = [change if count == row.maps else f"{change} ({count})" for change, count in row.changes.items()]
    told = "; ".join(filter(None, (" ".join(row.hooks), ", ".join(changes))))
    if row.inferred:
        told = "; ".join(filter(None, (told, f"{row.inferred} inferred" if told else "inferred")))
    numbers = (row.maps, row.via["mmap_prepare"], row.via["mmap"], row.via["compat"], row.merged)
    return (escape(row.name), *map(str, numbers), escape(told))
