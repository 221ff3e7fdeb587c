"""How vm_area_struct lies in memory: offsets, cache lines, holes, and what 1,000 VMAs cost.

The layout decides how many cache lines a page fault touches: see FEATURES["vma_layout_packed"].
"""

from __future__ import annotations

from dataclasses import dataclass

from vmatrace.btf import Btf, Member

CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A member, or a hole where ``name`` is empty; offsets and sizes in bytes, lines counted from 0."""

    offset: int
    size: int
    name: str
    type_name: str
    line: int


@dataclass(frozen=True, slots=True)
class StructLayout:
    """The layout of one struct; ``page_size`` is that of the machine that would hold the objects."""

    name: str
    size: int
    line_size: int
    page_size: int
    rows: tuple[Row, ...]

    @property
    def holes(self) -> tuple[Row, ...]:
        """The unused stretches."""
        return tuple(row for row in self.rows if not row.name)

    @property
    def lines(self) -> int:
        """Cache lines that an object covers."""
        return -(-self.size // self.line_size)

    @property
    def objects_per_page(self) -> int:
        """Objects in a page of the allocator, each begun on a cache line of its own."""
        return max(1, self.page_size // (self.lines * self.line_size))

    @property
    def pages_per_1000(self) -> int:
        """Pages that 1,000 objects take."""
        return -(-1000 // self.objects_per_page)

    @property
    def bytes_per_1000(self) -> int:
        """Bytes that 1,000 objects take, the rest of each page included."""
        return self.pages_per_1000 * self.page_size


def struct_layout(
    btf: Btf, name: str = "vm_area_struct", *, page_size: int = 4096, line_size: int = CACHE_LINE
) -> StructLayout:
    """The layout of a struct by BTF; members of unions share their offsets. Raises `CannotTrace`."""
    found = btf.struct(name)
    members = sorted(found.members.values(), key=lambda member: (member.bit_offset, -member.size))
    rows: list[Row] = []
    end = 0
    for member in members:
        if member.offset_bytes > end:
            rows.append(_hole(end, member.offset_bytes, line_size))
        rows.append(_row(member, line_size))
        end = max(end, member.offset_bytes + _bytes_of(member))
    if end < found.size:
        rows.append(_hole(end, found.size, line_size))
    return StructLayout(name, found.size, line_size, page_size, tuple(rows))


def _bytes_of(member: Member) -> int:
    if not member.bit_size:
        return member.size
    return -(-(member.bit_offset + member.bit_size) // 8) - member.offset_bytes


def _row(member: Member, line_size: int) -> Row:
    line = member.offset_bytes // line_size
    return Row(member.offset_bytes, _bytes_of(member), member.name, member.type_name, line)


def _hole(start: int, end: int, line_size: int) -> Row:
    return Row(start, end - start, "", "", start // line_size)
