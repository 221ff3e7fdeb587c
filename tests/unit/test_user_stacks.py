"""Numbers of user stacks, from the words that calls carry."""

from __future__ import annotations

import numpy as np

from vmatrace.capture.stacks import UserStacks

READ = {4: [0x1000, 0x2000], 5: [0x3000]}


def word(place: int, caller: int = 0) -> int:
    return (place + 1) << 48 | caller


def test_each_stack_is_written_once_with_its_leaf_s_caller() -> None:
    reads: list[int] = []

    def read(place: int) -> list[int]:
        reads.append(place)
        return list(READ[place])

    stacks = UserStacks(read)
    words = np.array([word(4, 0x1800), 0, word(5), word(4, 0x1800), word(4, 0x2000)], dtype=np.uint64)
    tables = stacks.tables(np.arange(5, dtype=np.uint64) * 2, words)
    assert tables["call_stacks"]["index"].tolist() == [0, 4, 6, 8]
    by_number = dict(zip(tables["stacks"]["stack"].tolist(), range(3), strict=True))
    offsets, columns = tables["stacks"]["frames"]
    frames = [columns["address"][offsets[by_number[n]] : offsets[by_number[n] + 1]].tolist()
              for n in tables["call_stacks"]["stack"].tolist()]  # fmt: skip
    assert frames == [[0x1000, 0x1800, 0x2000], [0x3000], [0x1000, 0x1800, 0x2000], [0x1000, 0x2000]]
    again = stacks.tables(np.array([10], dtype=np.uint64), words[:1])
    assert "stacks" not in again
    assert again["call_stacks"]["stack"].tolist() == tables["call_stacks"]["stack"][:1].tolist()
    assert len(reads) == 3
    assert stacks.lost == 0


def test_a_stack_that_found_no_room_is_number_0_and_counted() -> None:
    stacks = UserStacks(lambda place: [])
    tables = stacks.tables(np.array([2, 4], dtype=np.uint64), np.array([0xFFFF << 48, 0], dtype=np.uint64))
    assert tables.keys() == {"call_stacks"}
    assert tables["call_stacks"]["stack"].tolist() == [0]
    assert stacks.lost == 1
