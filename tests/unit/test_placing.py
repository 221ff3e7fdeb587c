"""Snapshots: which are consistent, which address space they are of, and where in the file they stand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cells import AFTER, call, cells_of, row, section
from vmatrace.capture.decode import Cloak
from vmatrace.capture.ring import Cells, find_heads
from vmatrace.capture.snapshot import ADDRESS_END, NO_CALL, find_place, snapshot_tables, split_views
from vmatrace.schema import KINDS

WORDS = 24


def rows_of(pid: int, mm: int, count: int = 3, *, seq: int = 4, space: int = 1, tid: int = 0, **more: int) -> Cells:
    """What the iterator writes for a process of ``count`` VMAs; ``more``: word number -> value."""
    rows = np.zeros((count, WORDS), dtype=np.uint64)
    rows[:, 0] = pid << 32 | (tid or pid)
    rows[:, 1] = mm
    rows[:, 2] = space | seq << 32
    rows[:, 5] = np.arange(count) * 0x2000 + 0x1000
    rows[:, 6] = rows[:, 5] + np.uint64(0x1000)
    rows[:, 14] = count
    for name, value in more.items():
        rows[:, int(name[1:])] = value
    return rows


def test_one_view_for_each_address_space() -> None:
    rows = np.concatenate([rows_of(10, 0xA), rows_of(11, 0xB, 5, space=2, seq=9), rows_of(12, 0xC, 1, space=3)])
    views = split_views(rows)
    assert [(v.pid, v.mm, v.space, v.seq, len(v.rows)) for v in views] == [
        (10, 0xA, 1, 4, 3),
        (11, 0xB, 2, 9, 5),
        (12, 0xC, 3, 4, 1),
    ]
    assert all(view.consistent for view in views)


def test_nothing_has_no_views() -> None:
    assert split_views(np.empty((0, WORDS), dtype=np.uint64)) == []


def test_tasks_that_share_an_address_space_give_it_once() -> None:
    torn = rows_of(10, 0xA)
    torn[1:, 2] += np.uint64(1 << 32)
    views = split_views(np.concatenate([torn, rows_of(11, 0xA, seq=6), rows_of(11, 0xA, seq=7, tid=12)]))
    assert [(view.mm, view.seq, view.consistent) for view in views] == [(0xA, 6, True)]


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(2, id="a write section came between"),
        pytest.param(3, id="a write section is open"),
        pytest.param(14, id="VMAs are missing"),
        pytest.param(1, id="the task changed its address space"),
    ],
)
def test_a_torn_view_is_not_consistent(word: int) -> None:
    rows = rows_of(10, 0xA)
    rows[:, word] += np.array([1 << 32 if word == 2 else 1, 0, 0], dtype=np.uint64)
    assert not split_views(rows)[0].consistent


def test_a_view_with_overlapping_rows_is_not_consistent() -> None:
    rows = rows_of(10, 0xA)
    rows[1, 5] = 0x1800
    assert not split_views(rows)[0].consistent


@pytest.mark.parametrize(("seq", "place"), [(0, 1), (1, 1), (2, 3), (3, 4), (4, 6), (9, 6)])
def test_a_view_stands_before_the_first_later_section(seq: int, place: int) -> None:
    found = cells_of(
        section(seq=8, space=2),
        section(row(AFTER, 0, 1), seq=2),
        call(seq=2),
        section(seq=3, flags=1),
        section(seq=4, kind="LAST"),
        section(seq=9, space=2),
    )
    assert find_place(found, find_heads(found), 1, seq) == place


def test_a_view_becomes_a_whole_state() -> None:
    rows = np.concatenate(
        [
            rows_of(10, 0xA, w7=0x75, w8=3, w9=0xF00, w15=77, w23=1000),
            rows_of(11, 0xB, 2, space=2, w19=5, w20=6),
        ]
    )
    views = split_views(rows)
    tables = snapshot_tables(views, [7, 9], Cloak(), introduce=True)
    sections, tasks = tables["sections"], tables["tasks"]
    assert sections["index"].tolist() == [7, 9]
    assert (tasks["index"] < sections["index"]).all()
    assert sections["nr"].tolist() == [NO_CALL] * 2
    assert sections["map_count"].tolist() == tasks["map_count"].tolist() == [3, 2]
    offsets, children = sections["after"]
    assert offsets.tolist() == [0, 3, 5]
    assert children["start"].tolist() == [0x1000, 0x3000, 0x5000, 0x1000, 0x3000]
    assert children["flags"].tolist() == [0x75] * 3 + [0] * 2
    assert 0xF00 not in children["object"].tolist()
    assert children["anon_vma"].tolist() == [0] * 5
    _, covers = sections["after_cover"]
    assert (covers["start"].tolist(), covers["end"].tolist()) == ([0, 0], [ADDRESS_END] * 2)
    assert covers["rows"].tolist() == [3, 2]
    assert set(sections["cpu"].tolist()) == {65535}, "no CPU's count has a hole by it"
    assert tasks["kind"].tolist() == [KINDS["FORK"]] * 2
    assert sections["brk"].tolist() == [0, 5]
    assert tasks["def_flags"].tolist() == [0, 6]


def test_no_views_make_no_tables() -> None:
    assert snapshot_tables([], [], Cloak(), introduce=True) == {}


def test_a_last_look_introduces_nobody() -> None:
    assert set(snapshot_tables(split_views(rows_of(10, 0xA)), [1], Cloak(), introduce=False)) == {"sections"}
