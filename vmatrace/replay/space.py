"""The model's address space as replay needs it: it keeps what an operation replaced, and where rules looked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from vmatrace.vma import AddressSpace, Vma

Change = tuple[tuple[Vma, ...], tuple[Vma, ...]]

_TOP: Final = (1 << 64) - 1
# What lies further from an address than a stack guard gap of 64 KiB pages decides nothing there.
_NEAR: Final = 256 << 16
_Space = TypeVar("_Space", bound=AddressSpace)


class TracedSpace(AddressSpace):
    """An address space that keeps the list of what the last operation replaced."""

    __slots__ = ("journal",)

    def __init__(self, vmas: Iterable[Vma] = ()) -> None:
        super().__init__(vmas)
        self.journal: list[Change] = []

    def commit(self) -> None:
        """Keep what happened since ``begin`` in ``journal``."""
        self.journal = self._journal or []
        super().commit()

    def undo(self) -> None:
        """Take back everything since ``begin``."""
        self.journal = []
        super().undo()

    def take_back(self) -> None:
        """Take back what the last operation did, though it was committed."""
        journal, self.journal = self.journal, []
        for old, new in reversed(journal):
            self.substitute(new, old)

    @property
    def serial(self) -> int:
        """The last symbol given out."""
        return self._serial

    @serial.setter
    def serial(self, value: int) -> None:
        self._serial = value

    def copy(self) -> TracedSpace:
        """An independent space with the same VMAs."""
        return _move(super().copy(), TracedSpace(()))

    def with_class(self, wanted: type[TracedSpace]) -> TracedSpace:
        """This space as one of another class; this one is not to be used any more."""
        twin = _move(self, wanted(()))
        twin.journal = self.journal
        return twin


def _move(source: AddressSpace, target: _Space) -> _Space:
    for name in AddressSpace.__slots__:
        setattr(target, name, getattr(source, name))
    return target


class WatchedSpace(TracedSpace):
    """Notes in ``looked`` which addresses every lookup since ``begin`` depended on.

    A neighbour that does not touch the address that was asked for decides nothing but that there is room.
    """

    __slots__ = ("looked",)

    def __init__(self, vmas: Iterable[Vma] = ()) -> None:
        super().__init__(vmas)
        self.looked: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Start keeping what is needed to undo."""
        self.looked = []
        super().begin()

    def __len__(self) -> int:
        self.looked.append((0, _TOP))
        return super().__len__()

    def __iter__(self) -> Iterator[Vma]:
        self.looked.append((0, _TOP))
        return super().__iter__()

    def find(self, addr: int) -> Vma | None:
        """The first VMA that ends above ``addr``."""
        found = super().find(addr)
        if found is not None and found.start <= addr:
            self.looked.append((addr, found.end))
        else:
            self.looked.append((addr, min(addr + _NEAR, _TOP if found is None else found.start)))
        return found

    def is_free(self, start: int, end: int) -> bool:
        """Whether no VMA shares a byte with ``[start, end)``."""
        self.looked.append((start, end))
        found = super().find(start)
        return found is None or found.start >= end

    def at(self, addr: int) -> Vma | None:
        """The VMA that contains ``addr``."""
        found = super().at(addr)
        self.looked.append((addr, addr + 1) if found is None else found[:2])
        return found

    def below(self, addr: int) -> Vma | None:
        """The last VMA that starts below ``addr``."""
        found = super().below(addr)
        if found is not None and found.end >= addr:
            self.looked.append((found.start, addr))
        else:
            self.looked.append((max(addr - _NEAR, 0 if found is None else found.end), addr))
        return found

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The VMAs that share a byte with ``[start, end)``."""
        found = super().overlapping(start, end)
        self.looked += [(start, end), *(vma[:2] for vma in (*found[:1], *found[-1:]))]
        return found
