"""A set of addresses as disjoint half-open intervals: what is not known of an address space, what was read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Intervals:
    """Sorted, disjoint and never touching; each change costs O(log n) and what it covers."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def copy(self) -> Intervals:
        """An independent set of the same addresses."""
        twin = Intervals()
        twin._starts, twin._ends = self._starts.copy(), self._ends.copy()
        return twin

    def add(self, start: int, end: int) -> None:
        """Put ``[start, end)`` in."""
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take ``[start, end)`` out."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        if first >= last:
            return
        low, high = self._starts[first], self._ends[last - 1]
        left = [(lo, hi) for lo, hi in ((low, start), (end, high)) if lo < hi]
        self._starts[first:last] = [lo for lo, _ in left]
        self._ends[first:last] = [hi for _, hi in left]

    def contains(self, start: int, end: int) -> bool:
        """Whether all of ``[start, end)`` is in it."""
        at = bisect_right(self._starts, start)
        return at > 0 and end <= self._ends[at - 1]

    def touches(self, start: int, end: int) -> bool:
        """Whether an address of ``[start, end)`` is in it."""
        return bisect_right(self._ends, start) < bisect_left(self._starts, end)
