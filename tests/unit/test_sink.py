"""The file of a recording: held to its size, closed with an honest end mark, never taking a device away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cells import AFTER, call, cells_of, row, section
from vmatrace.capture.ring import find_heads
from vmatrace.capture.sink import Sink
from vmatrace.errors import UsageError
from vmatrace.tracefile import TraceFile


def sink(path: Path, max_size: int | None = None) -> Sink:
    return Sink(path, {"command": []}, force=False, max_size=max_size, spaces=8)


def test_a_size_is_held_and_the_rest_is_not_counted(tmp_path: Path) -> None:
    made = sink(tmp_path / "t", 200_000)
    records = [call(cpu=n & 1, cpu_seq=n // 2 + 1, args=(n * 7919,) * 6) for n in range(20_000)]
    found = cells_of(*records)
    made.write_records(found, find_heads(found))
    assert made.state == "full"
    made.finish({"reason": made.reason, "records": made.records}, [10_000, 10_000])
    assert (tmp_path / "t").stat().st_size <= 200_000
    file = TraceFile(tmp_path / "t")
    seqs = [
        (int(c), int(s)) for b in file.batches() for c, s in zip(b["calls"]["cpu"], b["calls"]["cpu_seq"], strict=True)
    ]
    assert file.complete
    assert 500 < len(seqs) == made.records < 20_000
    assert seqs == [(n & 1, n // 2 + 1) for n in range(len(seqs))], "a whole beginning"
    assert file.end["cpu_seq"] == [max(s for c, s in seqs if c == cpu) for cpu in (0, 1)], "no loss is feigned"


def test_a_size_below_the_header_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max-size"):
        sink(tmp_path / "t", 1000)
    assert not (tmp_path / "t").exists()


def test_a_pipe_is_not_removed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    made = sink(tmp_path / "pipe")
    made.discard()
    assert (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_record_too_big_for_what_is_left_ends_the_trace(tmp_path: Path) -> None:
    made = sink(tmp_path / "t", 60_000)
    found = cells_of(section(*[row(AFTER, n, n + 1) for n in range(5_000)]), call())
    made.write_records(found, find_heads(found))
    assert (made.state, made.records) == ("full", 0)
    made.finish({"reason": made.reason}, [2])
    file = TraceFile(tmp_path / "t")
    list(file.batches())
    assert (file.complete, file.end["cpu_seq"]) == (True, [0])


def test_what_was_made_after_the_end_is_no_part_and_no_loss(tmp_path: Path) -> None:
    """Records of two CPUs, each CPU's in order; the last of CPU 1 and the two last of CPU 0 came too late."""
    made = sink(tmp_path / "t")
    records = [section(row(AFTER, n, n + 1), cpu=n & 1, cpu_seq=n // 2 + 1) for n in range(6)]
    for record, time in zip(records, (10, 11, 20, 12, 21, 22), strict=True):
        record[0][2] = time
    found = cells_of(*records)
    made.write_records(found, find_heads(found), until=15)
    assert made.records == 3
    made.finish({"reason": "", "records": made.records}, [3, 3])
    file = TraceFile(tmp_path / "t")
    rows = [seq for batch in file.batches() for seq in batch["sections"]["time"].tolist()]
    assert (rows, file.end["cpu_seq"]) == ([10, 11, 12], [1, 2])
