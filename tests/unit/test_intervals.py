"""Intervals of addresses, against a set of single addresses."""

from __future__ import annotations

import random

import pytest

from vmatrace.replay.intervals import Intervals

TOP = 40


@pytest.mark.parametrize("seed", range(60))
def test_it_holds_what_a_set_of_addresses_would(seed: int) -> None:
    dice = random.Random(seed)
    found, due = Intervals(), set[int]()
    for _ in range(30):
        start = dice.randrange(TOP)
        end = start + dice.randint(1, 8)
        if dice.random() < 0.5:
            found.add(start, end)
            due |= set(range(start, end))
        else:
            found.remove(start, end)
            due -= set(range(start, end))
        held = list(found)
        assert {at for lo, hi in held for at in range(lo, hi)} == due
        assert all(held[i][1] < held[i + 1][0] for i in range(len(held) - 1))
        assert bool(found) == bool(due)
        low = dice.randrange(TOP)
        high = low + dice.randint(1, 8)
        assert found.touches(low, high) == any(at in due for at in range(low, high))
        assert found.contains(low, high) == all(at in due for at in range(low, high))
    twin = found.copy()
    twin.add(0, TOP)
    assert {at for lo, hi in found for at in range(lo, hi)} == due
