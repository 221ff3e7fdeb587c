"""Draws layouts on a page ruler, as commit messages of the kernel do; text in, nothing printed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vmatrace.vma import Vma, flag_names

# A gap or VMA longer than this many pages is drawn shortened, so that a line stays readable.
_LONGEST = 12


def draw(layouts: Sequence[tuple[str, Sequence[Vma]]], shift: int = 12) -> list[str]:
    """Lines that show each labelled layout to one scale: a VMA is a run of letters, equal letters equal
    attributes.

    The ruler below marks page numbers (hex) at each boundary; long stretches are shortened to ``~``.
    """
    edges = sorted({edge for _, vmas in layouts for vma in vmas for edge in (vma.start, vma.end)})
    if not edges:
        return [f"{label}: (no VMA)" for label, _ in layouts]
    columns: dict[int, int] = {edges[0]: 0}
    for low, high in pairwise(edges):
        columns[high] = columns[low] + max(2, min(_LONGEST, (high - low) >> shift) * 2)
    letters: dict[tuple[object, ...], str] = {}
    width = max(len(label) for label, _ in layouts)
    lines = [f"{label:<{width}}  {_layout(vmas, columns, letters)}".rstrip() for label, vmas in layouts]
    return [*lines, f"{'':<{width}}  {_ruler(columns, shift)}"]


def legend(layouts: Sequence[tuple[str, Sequence[Vma]]]) -> list[str]:
    """A line for each letter of `draw`: the flags, and what else the VMAs of that letter have."""
    letters: dict[tuple[object, ...], str] = {}
    lines = []
    for _, vmas in layouts:
        for vma in vmas:
            known = len(letters)
            letter = _letter(vma, letters)
            if len(letters) > known:
                lines.append(f"{letter}  {_attributes(vma)}")
    return lines


def _attributes(vma: Vma) -> str:
    words = ["|".join(flag_names(vma.flags)) or "no flags"]
    if vma.file is not None:
        words.append("a file")
    if vma.anon_vma is not None:
        words.append("a forked anon_vma" if vma.forked else "an anon_vma")
    words += [word for word in ("policy", "uffd", "name") if getattr(vma, word) is not None]
    return ", ".join(words)


def _letter(vma: Vma, letters: dict[tuple[object, ...], str]) -> str:
    key = (vma.flags, vma.file, vma.anon_vma, vma.policy, vma.uffd, vma.name)
    return letters.setdefault(key, chr(ord("a") + len(letters) % 26))


def _layout(vmas: Sequence[Vma], columns: dict[int, int], letters: dict[tuple[object, ...], str]) -> str:
    text = ""
    for vma in vmas:
        letter = _letter(vma, letters)
        text = text.ljust(columns[vma.start])
        span = columns[vma.end] - columns[vma.start]
        text += "|" + letter * (span - 1)
        if not any(other.start == vma.end for other in vmas):
            text += "|"
    return text


def _ruler(columns: dict[int, int], shift: int) -> str:
    text = ""
    for edge, column in columns.items():
        if column >= len(text) + (1 if text else 0):
            text = text.ljust(column) + f"{edge >> shift:x}"
    return text
