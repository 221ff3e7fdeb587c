"""The oracle of the live tests: a dump of ``/proc/PID/maps`` and a timeline's JSON in the same form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GATE = "[vsyscall]"


@dataclass(frozen=True, slots=True)
class Line:
    """One VMA as maps shows it: offset in bytes (0 without a file), device as (major, minor)."""

    start: int
    end: int
    perms: str
    offset: int
    dev: tuple[int, int]
    ino: int

    def __str__(self) -> str:
        major, minor = self.dev
        return (
            f"{self.start:x}-{self.end:x} {self.perms} {self.offset:08x} {major:02x}:{minor:02x} {self.ino}"
        )


def read_maps(path: Path) -> list[Line]:
    """The VMAs of a dump; the gate page is left out, for it is no VMA."""
    lines = []
    for text in path.read_text(errors="surrogateescape").splitlines():
        where, perms, offset, dev, ino, *name = text.split(maxsplit=5)
        if name and name[0] == _GATE:
            continue
        start, end = (int(word, 16) for word in where.split("-"))
        major, minor = (int(word, 16) for word in dev.split(":"))
        lines.append(Line(start, end, perms, int(offset, 16), (major, minor), int(ino)))
    return lines


def from_timeline(vmas: Iterable[Mapping[str, Any]], page_size: int) -> list[Line]:
    """The VMAs of ``vmatrace timeline --format json`` as maps would show them."""
    return [_line(vma, page_size) for vma in vmas]


def _line(vma: Mapping[str, Any], page_size: int) -> Line:
    flags = set(vma["flags"])
    perms = "".join(
        letter if flag in flags else "-" for flag, letter in (("READ", "r"), ("WRITE", "w"), ("EXEC", "x"))
    )
    perms += "s" if "MAYSHARE" in flags else "p"
    file = vma["file"]
    if file is None:
        return Line(vma["start"], vma["end"], perms, 0, (0, 0), 0)
    return Line(
        vma["start"], vma["end"], perms, vma["pgoff"] * page_size, device(file["dev"]), int(file["ino"])
    )


def device(dev: int | str) -> tuple[int, int]:
    """A device as (major, minor), from the kernel's ``dev_t`` (20 bits of minor) or "major:minor" in hex."""
    if isinstance(dev, int):
        return dev >> 20, dev & 0xFFFFF
    major, minor = dev.split(":")
    return int(major, 16), int(minor, 16)


def difference(due: list[Line], got: list[Line]) -> str:
    """What is missing and what is too much, a line each; empty if they are equal."""
    missing = [f"- {line}" for line in due if line not in set(got)]
    extra = [f"+ {line}" for line in got if line not in set(due)]
    return "\n".join(missing + extra)
