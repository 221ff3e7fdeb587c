"""VMAs as immutable values, the names of their flag bits, and the sorted address space that holds them.

Nothing here knows a rule of the kernel: what may merge, split or grow is decided in ``vmatrace.rules``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from vmatrace.errors import UsageError, nearest

# Bit numbers of x86_64 from v6.16 on (include/linux/mm.h). Names are the kernel's without VM_.
_BITS: Final[dict[str, int]] = {
    "READ": 0, "WRITE": 1, "EXEC": 2, "SHARED": 3,
    "MAYREAD": 4, "MAYWRITE": 5, "MAYEXEC": 6, "MAYSHARE": 7,
    "GROWSDOWN": 8, "UFFD_MISSING": 9, "PFNMAP": 10, "MAYBE_GUARD": 11,
    "UFFD_WP": 12, "LOCKED": 13, "IO": 14, "SEQ_READ": 15,
    "RAND_READ": 16, "DONTCOPY": 17, "DONTEXPAND": 18, "LOCKONFAULT": 19,
    "ACCOUNT": 20, "NORESERVE": 21, "HUGETLB": 22, "SYNC": 23,
    "ARCH_1": 24, "WIPEONFORK": 25, "DONTDUMP": 26, "SOFTDIRTY": 27,
    "MIXEDMAP": 28, "HUGEPAGE": 29, "NOHUGEPAGE": 30, "MERGEABLE": 31,
    "PKEY_BIT0": 32, "PKEY_BIT1": 33, "PKEY_BIT2": 34, "PKEY_BIT3": 35,
    "PKEY_BIT4": 36, "SHADOW_STACK": 37, "MTE_ALLOWED": 38, "ALLOW_ANY_UNCACHED": 39,
    "DROPPABLE": 40, "UFFD_MINOR": 41, "SEALED": 42,
}  # fmt: skip

#: Flag name (without ``VM_``) to its bit as a mask.
FLAG_BITS: Final[dict[str, int]] = {name: 1 << bit for name, bit in _BITS.items()}
# v6.10 to v6.16 have VM_SEALED in the last bit.
_NAMES: Final[dict[int, str]] = {**{bit: name for name, bit in _BITS.items()}, 63: "SEALED"}

#: Where VM_SEALED was before it moved down to bit 42.
SEALED_OLD: Final = 1 << 63

READ: Final = FLAG_BITS["READ"]
WRITE: Final = FLAG_BITS["WRITE"]
EXEC: Final = FLAG_BITS["EXEC"]
SHARED: Final = FLAG_BITS["SHARED"]
MAYREAD: Final = FLAG_BITS["MAYREAD"]
MAYWRITE: Final = FLAG_BITS["MAYWRITE"]
MAYEXEC: Final = FLAG_BITS["MAYEXEC"]
MAYSHARE: Final = FLAG_BITS["MAYSHARE"]
GROWSDOWN: Final = FLAG_BITS["GROWSDOWN"]
UFFD_MISSING: Final = FLAG_BITS["UFFD_MISSING"]
PFNMAP: Final = FLAG_BITS["PFNMAP"]
MAYBE_GUARD: Final = FLAG_BITS["MAYBE_GUARD"]
UFFD_WP: Final = FLAG_BITS["UFFD_WP"]
LOCKED: Final = FLAG_BITS["LOCKED"]
IO: Final = FLAG_BITS["IO"]
SEQ_READ: Final = FLAG_BITS["SEQ_READ"]
RAND_READ: Final = FLAG_BITS["RAND_READ"]
DONTCOPY: Final = FLAG_BITS["DONTCOPY"]
DONTEXPAND: Final = FLAG_BITS["DONTEXPAND"]
LOCKONFAULT: Final = FLAG_BITS["LOCKONFAULT"]
ACCOUNT: Final = FLAG_BITS["ACCOUNT"]
NORESERVE: Final = FLAG_BITS["NORESERVE"]
HUGETLB: Final = FLAG_BITS["HUGETLB"]
SYNC: Final = FLAG_BITS["SYNC"]
#: arm64: branch targets are guarded (VM_ARM64_BTI).
ARCH_1: Final = FLAG_BITS["ARCH_1"]
WIPEONFORK: Final = FLAG_BITS["WIPEONFORK"]
DONTDUMP: Final = FLAG_BITS["DONTDUMP"]
SOFTDIRTY: Final = FLAG_BITS["SOFTDIRTY"]
MIXEDMAP: Final = FLAG_BITS["MIXEDMAP"]
HUGEPAGE: Final = FLAG_BITS["HUGEPAGE"]
NOHUGEPAGE: Final = FLAG_BITS["NOHUGEPAGE"]
MERGEABLE: Final = FLAG_BITS["MERGEABLE"]
SHADOW_STACK: Final = FLAG_BITS["SHADOW_STACK"]
#: arm64 has it in bit 37 and its shadow stack in bit 38: traces are read with the two swapped.
MTE_ALLOWED: Final = FLAG_BITS["MTE_ALLOWED"]
DROPPABLE: Final = FLAG_BITS["DROPPABLE"]
UFFD_MINOR: Final = FLAG_BITS["UFFD_MINOR"]
SEALED: Final = FLAG_BITS["SEALED"]
PKEY_SHIFT: Final = _BITS["PKEY_BIT0"]
PKEY_MASK: Final = 0xF << PKEY_SHIFT

ACCESS: Final = READ | WRITE | EXEC
MAY_ALL: Final = MAYREAD | MAYWRITE | MAYEXEC
SPECIAL: Final = IO | DONTEXPAND | PFNMAP | MIXEDMAP
LOCKED_MASK: Final = LOCKED | LOCKONFAULT
UFFD_FLAGS: Final = UFFD_MISSING | UFFD_WP | UFFD_MINOR


def parse_flags(names: Iterable[str]) -> int:
    """The bits of flag names; ``BIT_n`` names bit ``n``. Raises UsageError naming the nearest flags."""
    bits = 0
    for name in names:
        bit = FLAG_BITS.get(name)
        if bit is None:
            bit = _numbered_bit(name)
        bits |= bit
    return bits


def _numbered_bit(name: str) -> int:
    number = name.removeprefix("BIT_")
    if number != name and number.isdecimal() and int(number) < 128:
        return 1 << int(number)
    near = nearest(name, FLAG_BITS)
    raise UsageError(f"unknown flag {name!r}", f"did you mean {near}?" if near else "see `vmatrace rules`")


def flag_names(bits: int) -> list[str]:
    """The names of the bits that are set, lowest first; a bit without a name is ``BIT_n``."""
    names = []
    while bits:
        lowest = bits & -bits
        number = lowest.bit_length() - 1
        names.append(_NAMES.get(number) or f"BIT_{number}")
        bits ^= lowest
    return names


class Vma(NamedTuple):
    """One VMA as a value: what ``vm_area_struct`` holds as far as a rule looks at it.

    ``start`` and ``end`` are bytes, half open; ``flags`` the bits of ``vm_flags``; ``pgoff`` pages.
    Identities (``file``, ``anon_vma``, ``uffd``, ``policy``, ``name``, ``obj``) are any hashable value,
    None for absent. ``anonymous`` says that ``vm_ops`` is NULL, which private /dev/zero is in spite of its
    file.
    """

    start: int
    end: int
    flags: int
    pgoff: int
    file: Hashable = None
    anonymous: bool = True
    #: ``vm_ops->close`` exists.
    close: bool = False
    anon_vma: Hashable = None
    #: More than one entry in the anon_vma chain: a fork child's copy of a faulted VMA.
    forked: bool = False
    uffd: Hashable = None
    #: Identity of the policy's content, not of its pointer.
    policy: Hashable = None
    #: Anonymous name (PR_SET_VMA_ANON_NAME), compared as text.
    name: Hashable = None
    #: Which ``vm_area_struct`` this is; negative numbers are objects that the model made.
    obj: Hashable = None
    #: What kind of mapping: "" (decided by the other fields), shmem, sysv, secretmem, special, dax, aio, ...
    kind: str = ""
    #: Page offset of the anonymous pages where the kernel has a second one (7.3), else None.
    anon_pgoff: int | None = None
    #: Bytes of one huge page where HUGETLB is set, else 0.
    huge_size: int = 0

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    def cut(self, start: int, end: int, shift: int = 12) -> Vma:
        """The piece ``[start, end)`` of this VMA, page offsets adjusted (``shift``: log2 of page size)."""
        pages = (start - self.start) >> shift
        anon_pgoff = self.anon_pgoff
        if anon_pgoff is not None:
            anon_pgoff += pages
        return Vma(start, end, self.flags, self.pgoff + pages, *self[4:14], anon_pgoff, self.huge_size)

    def with_flags(self, flags: int) -> Vma:
        """The same VMA with other flags."""
        return Vma(self.start, self.end, flags, *self[3:])

    def __str__(self) -> str:
        names = "|".join(flag_names(self.flags)) or "-"
        return f"[{self.start:#x}, {self.end:#x}) pgoff {self.pgoff:#x} {names}"


# A chunk splits when it grows past this: memmove inside it stays far cheaper than one rule.
_CHUNK: Final = 512


class AddressSpace:
    """The VMAs of one mm, sorted and disjoint; each change costs O(log n).

    The lookups follow the kernel's iterators: ``find`` is find_vma, ``below`` the previous VMA. Every
    change goes through ``substitute``, so that ``undo_to`` can take back what an operation did.
    """

    __slots__ = ("_chunks", "_count", "_firsts", "_journal", "_serial")

    def __init__(self, vmas: Iterable[Vma] = ()) -> None:
        ordered = sorted(vmas)
        for vma in ordered:
            if vma.start >= vma.end:
                raise ValueError(f"empty VMA {vma}")
        for left, right in pairwise(ordered):
            if left.end > right.start:
                raise ValueError(f"VMAs overlap: {left} and {right}")
        self._chunks = [ordered[i : i + _CHUNK // 2] for i in range(0, len(ordered), _CHUNK // 2)] or [[]]
        self._firsts = [0] + [chunk[0].start for chunk in self._chunks[1:]]
        self._count = len(ordered)
        self._serial = 0
        self._journal: list[tuple[tuple[Vma, ...], tuple[Vma, ...]]] | None = None

    def copy(self) -> AddressSpace:
        """An independent space with the same VMAs (values are shared)."""
        twin = AddressSpace.__new__(AddressSpace)
        twin._chunks = [chunk.copy() for chunk in self._chunks]
        twin._firsts = self._firsts.copy()
        twin._count = self._count
        twin._serial = self._serial
        twin._journal = None
        return twin

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Vma]:
        for chunk in self._chunks:
            yield from chunk

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AddressSpace) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AddressSpace({list(self)!r})"

    def fresh(self) -> int:
        """An identity for an object that the model makes: -1, -2, ... never used before in this space."""
        self._serial -= 1
        return self._serial

    def find(self, addr: int) -> Vma | None:
        """The first VMA that ends above ``addr`` (find_vma): it contains ``addr`` or lies above it."""
        at = bisect_right(self._firsts, addr) - 1
        chunk = self._chunks[at]
        i = bisect_left(chunk, (addr + 1,))
        if i and chunk[i - 1].end > addr:
            return chunk[i - 1]
        if i < len(chunk):
            return chunk[i]
        return self._chunks[at + 1][0] if at + 1 < len(self._chunks) else None

    def at(self, addr: int) -> Vma | None:
        """The VMA that contains ``addr`` (vma_lookup)."""
        chunk = self._chunks[bisect_right(self._firsts, addr) - 1]
        i = bisect_left(chunk, (addr + 1,))
        return chunk[i - 1] if i and chunk[i - 1].end > addr else None

    def below(self, addr: int) -> Vma | None:
        """The last VMA that starts below ``addr`` (the previous VMA of one that starts there)."""
        at = bisect_left(self._firsts, addr) - 1
        if at < 0:
            return None
        i = bisect_left(self._chunks[at], (addr,))
        if i:
            return self._chunks[at][i - 1]
        return self._chunks[at - 1][-1] if at else None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The VMAs that share a byte with ``[start, end)``, in order."""
        found: list[Vma] = []
        at = bisect_right(self._firsts, start) - 1
        i = bisect_left(self._chunks[at], (start + 1,))
        if i and self._chunks[at][i - 1].end > start:
            i -= 1
        while at < len(self._chunks):
            chunk = self._chunks[at]
            stop = bisect_left(chunk, (end,), i)
            found += chunk[i:stop]
            if stop < len(chunk):
                break
            at, i = at + 1, 0
        return found

    def is_free(self, start: int, end: int) -> bool:
        """Whether no VMA shares a byte with ``[start, end)``."""
        vma = self.find(start)
        return vma is None or vma.start >= end

    def substitute(self, old: Sequence[Vma], new: Sequence[Vma]) -> None:
        """Take the VMAs ``old`` out and put ``new`` in: the only way to change a space."""
        if self._journal is not None:
            self._journal.append((tuple(old), tuple(new)))
        self._count += len(new) - len(old)
        shared = min(len(old), len(new))
        for i in range(shared):
            self._swap(old[i], new[i])
        for vma in old[shared:]:
            self._remove(vma)
        for vma in new[shared:]:
            self._insert(vma)

    def begin(self) -> None:
        """Start keeping what is needed to undo."""
        self._journal = []

    def commit(self) -> None:
        """Stop keeping what is needed to undo."""
        self._journal = None

    def undo(self) -> None:
        """Take back everything since ``begin``."""
        journal, self._journal = self._journal or [], None
        for old, new in reversed(journal):
            self.substitute(new, old)

    def _swap(self, old: Vma, new: Vma) -> None:
        at = bisect_right(self._firsts, old.start) - 1
        chunk = self._chunks[at]
        i = bisect_left(chunk, (old.start,))
        lower = chunk[i - 1].start if i else self._firsts[at] - 1
        upper = chunk[i + 1].start if i + 1 < len(chunk) else None
        if lower < new.start and (
            (upper is None and new.start <= old.start) or (upper is not None and new.start < upper)
        ):
            chunk[i] = new
            return
        self._remove(old)
        self._insert(new)

    def _remove(self, vma: Vma) -> None:
        at = bisect_right(self._firsts, vma.start) - 1
        chunk = self._chunks[at]
        i = bisect_left(chunk, (vma.start,))
        if i >= len(chunk) or chunk[i].start != vma.start:
            raise KeyError(f"no such VMA: {vma}")
        del chunk[i]
        if not chunk and len(self._chunks) > 1:
            del self._chunks[at]
            del self._firsts[at]
            self._firsts[0] = 0

    def _insert(self, vma: Vma) -> None:
        at = bisect_right(self._firsts, vma.start) - 1
        chunk = self._chunks[at]
        if not chunk or vma.start > chunk[-1].start:
            chunk.append(vma)
        else:
            insort(chunk, vma)
        if len(chunk) > _CHUNK:
            upper = chunk[_CHUNK // 2 :]
            del chunk[_CHUNK // 2 :]
            self._chunks.insert(at + 1, upper)
            self._firsts.insert(at + 1, upper[0].start)
