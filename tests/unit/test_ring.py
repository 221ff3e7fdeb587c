"""The ring buffer's reader: record heads among cells, whatever text they hold, and reading in bulk."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from tests import cells
from tests.cells import AFTER, BEFORE, Cell, call, cells_of, file, row, section
from vmatrace.capture.ring import FILE_CELLS, LARGEST, RingReader, find_heads
from vmatrace.schema import CELL_BYTES, KINDS

PAGE = mmap.PAGESIZE
SIZE = 1 << 16


def starts(*records: list[Cell]) -> list[int]:
    """Where each record begins."""
    return np.cumsum([0, *(len(record) for record in records)])[:-1].tolist()


def test_heads_are_the_cells_with_an_even_tag() -> None:
    records = [section(row(BEFORE, 0, 1), row(AFTER, 0, 1)), call(), section(), call()]
    assert find_heads(cells_of(*records)).tolist() == starts(*records)


def test_no_cells_have_no_heads() -> None:
    assert find_heads(np.empty((0, 8), dtype=np.uint64)).tolist() == []


@pytest.mark.parametrize("byte", [0, 2, 8, 64, 254, 255])
def test_text_of_a_path_is_no_head(byte: int) -> None:
    records = [call(), file(bytes([byte]) * 1000), section(row(AFTER, 0, 1)), file(b"x\0"), call()]
    assert find_heads(cells_of(*records)).tolist() == starts(*records)


def test_a_path_that_looks_like_a_file_record_hides_nothing() -> None:
    """Its text repeats the very head of a file record, cell by cell."""
    forged = np.array(cells.head("FILE", FILE_CELLS), dtype=np.uint64).tobytes()
    records = [file(b"\0" * 56 + forged * 15), call(), section(row(AFTER, 0, 1))]
    assert find_heads(cells_of(*records)).tolist() == starts(*records)


def test_random_text_is_no_head() -> None:
    chance = random.Random(7)
    records = []
    for _ in range(200):
        kind = chance.randrange(3)
        records.append([call(), section(row(BEFORE, 0, 1)), file(chance.randbytes(chance.randrange(1024)))][kind])
    assert find_heads(cells_of(*records)).tolist() == starts(*records)


class Ring:
    """What the kernel maps for a ring buffer: consumer page, producer page, the data twice."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * SIZE)
        self.view = mmap.mmap(self.fd, 2 * PAGE + 2 * SIZE)
        self.words = np.frombuffer(self.view, dtype=np.uint64)
        self.data = self.words[2 * PAGE // 8 :]

    @property
    def consumed(self) -> int:
        return int(self.words[0])

    def start_at(self, place: int) -> None:
        """Both positions, in bytes since the beginning of time."""
        self.words[0] = self.words[PAGE // 8] = place

    def put(self, *records: list[Cell]) -> None:
        """Add records, as a producer would: round the corner, and in both mappings."""
        place = int(self.words[PAGE // 8])
        for cell in (cell for record in records for cell in record):
            at = place % SIZE // 8
            for copy in (at, at + SIZE // 8):
                self.data[copy : copy + 8] = cell
            place += CELL_BYTES
        self.words[PAGE // 8] = place


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring()
    yield made
    os.close(made.fd)


def kinds(found: np.ndarray, heads: np.ndarray) -> list[int]:
    return (found[heads, 1] & np.uint64(0xFF)).tolist()


def test_what_is_there_comes_whole_and_stays_until_freed(ring: Ring) -> None:
    reader = RingReader(ring.fd, SIZE)
    found, heads = reader.take()
    assert (len(found), len(heads), reader.free(), reader.waiting) == (0, 0, 0, 0)
    ring.put(call(), section(row(BEFORE, 0, 1)))
    assert len(reader.take()[0]) == 4
    ring.put(call())
    found, heads = reader.take()
    assert heads.tolist() == [0, 2, 4]
    assert kinds(found, heads) == [KINDS["CALL"], KINDS["SECTION"], KINDS["CALL"]]
    assert (ring.consumed, reader.waiting) == (0, 6)
    assert reader.free() == 6
    assert (ring.consumed, reader.waiting) == (6 * CELL_BYTES, 0)
    assert reader.free() == 0, "once"
    del found
    reader.close()


def test_reading_goes_round_the_corner(ring: Ring) -> None:
    ring.start_at(5 * SIZE - 3 * CELL_BYTES)
    reader = RingReader(ring.fd, SIZE)
    ring.put(call(), section(row(BEFORE, 4096, 8192), row(AFTER, 4096, 8192)), call())
    found, heads = reader.take()
    assert heads.tolist() == [0, 2, 5]
    assert found[3, 1] == 4096
    assert reader.free() == 7
    assert ring.consumed == 5 * SIZE + 4 * CELL_BYTES


@pytest.mark.parametrize("stale", [section(row(BEFORE, 0, 1), kind="LAST"), file(b"\2" * 900), call()])
def test_reading_stops_at_a_record_still_being_written(ring: Ring, stale: list[Cell]) -> None:
    """Its cells are what lay there before: nothing in them or behind them counts yet."""
    reader = RingReader(ring.fd, SIZE)
    busy = [list(cell) for cell in stale]
    busy[0][0] |= cells.BUSY
    ring.put(call(), busy, call())
    assert reader.take()[1].tolist() == [0]
    assert reader.free() == 2
    assert (len(reader.take()[0]), reader.free()) == (0, 0)
    ring.data[2 * 8] = stale[0][0]
    assert reader.take()[1].tolist() == [0, len(stale)]
    assert reader.free() == len(stale) + 2


def test_a_record_that_the_limit_cuts_waits_for_the_next_time(ring: Ring) -> None:
    reader = RingReader(ring.fd, SIZE)
    ring.put(*[call()] * (LARGEST // 2 - 1), section(row(BEFORE, 0, 1), row(AFTER, 0, 1)), call())
    assert len(reader.take(5)[1]) == LARGEST // 2 - 1
    assert reader.free() == LARGEST - 2
    assert reader.take(5)[1].tolist() == [0, 3]
    assert reader.free() == 5


def test_a_file_record_that_the_limit_cuts_waits_too(ring: Ring) -> None:
    reader = RingReader(ring.fd, SIZE)
    ring.put(*[call()] * (LARGEST // 2 - 1), file(b"\4" * 1000), call())
    reader.take(5)
    assert reader.free() == LARGEST - 2
    found, heads = reader.take(5)
    assert kinds(found, heads) == [KINDS["FILE"], KINDS["CALL"]]
    assert reader.free() == FILE_CELLS + 2


def test_a_storm_of_records_arrives_complete_and_in_order(ring: Ring) -> None:
    chance = random.Random(11)
    reader = RingReader(ring.fd, SIZE)
    sent, got = 0, []
    while len(got) < 3000:
        while sent < 3000 and int(ring.words[PAGE // 8]) - ring.consumed < SIZE - 20 * CELL_BYTES:
            many = chance.randrange(4)
            body = [row(BEFORE, sent, sent + 1)] * many
            ring.put([call(cpu_seq=sent), section(*body, cpu_seq=sent), file(b"\0\2" * 300, cpu_seq=sent)][many % 3])
            sent += 1
        found, heads = reader.take(700)
        got += (found[heads, 5] >> np.uint64(16)).tolist()
        reader.free()
    assert got == list(range(3000))
