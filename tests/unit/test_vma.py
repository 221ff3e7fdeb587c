"""VMA values, flag names, and the address space against a plain list."""

from __future__ import annotations

import random

import pytest

from vmatrace.errors import UsageError
from vmatrace.vma import FLAG_BITS, READ, SEALED, WRITE, AddressSpace, Vma, flag_names, parse_flags


def vma(start: int, end: int) -> Vma:
    return Vma(start, end, READ, start >> 12, obj=start)


def test_flag_names_and_bits_are_inverse() -> None:
    for name, bit in FLAG_BITS.items():
        assert flag_names(bit) == [name]
        assert parse_flags([name]) == bit
    assert flag_names(READ | SEALED) == ["READ", "SEALED"]


def test_a_bit_without_a_name() -> None:
    assert flag_names(1 << 50) == ["BIT_50"]
    assert parse_flags(["BIT_50", "WRITE"]) == 1 << 50 | WRITE
    assert parse_flags(["BIT_100"]) == 1 << 100


@pytest.mark.parametrize("name", ["", "read", "BIT_", "BIT_x", "BIT_128", "SEELED"])
def test_unknown_flags_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown flag"):
        parse_flags([name])


def test_a_near_flag_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(["SEELED"])
    assert "SEALED" in caught.value.hint


def test_cut_moves_both_page_offsets() -> None:
    whole = Vma(0x1000, 0x5000, READ, 7, anon_pgoff=1)
    piece = whole.cut(0x3000, 0x4000)
    assert (piece.start, piece.end, piece.pgoff, piece.anon_pgoff) == (0x3000, 0x4000, 9, 3)
    assert Vma(0, 0x40000, READ, 0).cut(0x10000, 0x20000, shift=16).pgoff == 1


def test_a_space_refuses_overlap_and_emptiness() -> None:
    with pytest.raises(ValueError, match="overlap"):
        AddressSpace([vma(0, 0x2000), vma(0x1000, 0x3000)])
    with pytest.raises(ValueError, match="empty"):
        AddressSpace([vma(0x1000, 0x1000)])


def test_a_missing_vma_cannot_be_taken_out() -> None:
    with pytest.raises(KeyError):
        AddressSpace([vma(0, 0x1000)]).substitute([vma(0x5000, 0x6000)], [])


def test_undo_takes_back_everything_since_begin() -> None:
    first, second = vma(0, 0x4000), vma(0x4000, 0x8000)
    space = AddressSpace([first, second])
    space.begin()
    space.substitute([first], [vma(0, 0x1000), vma(0x2000, 0x4000)])
    space.substitute([second], [])
    space.undo()
    assert list(space) == [first, second]
    assert len(space) == 2


def test_copies_are_independent() -> None:
    space = AddressSpace([vma(0, 0x1000)])
    twin = space.copy()
    twin.substitute([], [vma(0x5000, 0x6000)])
    assert (len(space), len(twin)) == (1, 2)
    assert space != twin
    assert space.fresh() == twin.fresh() == -1


def naive_find(vmas: list[Vma], addr: int) -> Vma | None:
    return next((each for each in vmas if each.end > addr), None)


@pytest.mark.parametrize("seed", range(4))
def test_lookups_agree_with_a_plain_list(seed: int) -> None:
    rng = random.Random(seed)
    space, plain = AddressSpace(), []
    for _ in range(1500):
        slot = rng.randrange(3000)
        made = vma(slot * 0x4000 + rng.randrange(2) * 0x1000, slot * 0x4000 + rng.randrange(2, 5) * 0x1000)
        if any(each.start // 0x4000 == slot for each in plain):
            found = next(each for each in plain if each.start // 0x4000 == slot)
            space.substitute([found], [])
            plain.remove(found)
        else:
            space.substitute([], [made])
            plain.append(made)
        plain.sort()
        addr = rng.randrange(3000 * 0x4000)
        at = naive_find(plain, addr)
        assert space.find(addr) == at
        assert space.at(addr) == (at if at is not None and at.start <= addr else None)
        assert space.below(addr) == next((each for each in reversed(plain) if each.start < addr), None)
        high = addr + rng.randrange(1, 0x40000)
        assert space.overlapping(addr, high) == [
            each for each in plain if each.end > addr and each.start < high
        ]
        assert space.is_free(addr, high) == (not space.overlapping(addr, high))
    assert list(space) == plain
    assert list(AddressSpace(plain)) == plain
