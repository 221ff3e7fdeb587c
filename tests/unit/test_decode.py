"""The decoder: cells become columns, parts become sections, pointers opaque ids, names paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import cells
from tests.cells import (
    AFTER,
    BEFORE,
    EXTRA,
    PARTIAL,
    Cell,
    call,
    cells_of,
    cover,
    evidence,
    extra,
    file,
    row,
    section,
)
from vmatrace.capture.decode import ANON_INODE_FS, Cloak, Decoder, path_of
from vmatrace.capture.ring import find_heads
from vmatrace.schema import EVIDENCE, KINDS, TABLES

STORE, ALLOC = EVIDENCE["EVIDENCE_STORE"], EVIDENCE["EVIDENCE_ALLOC"]


class Clear(Cloak):
    """A cloak that hides nothing, so that a test can see the pointers."""

    def __call__(self, words: Any) -> Any:
        return np.array(words)


def decode(decoder: Decoder, *records: list[Cell]) -> dict[str, Any]:
    found = cells_of(*records)
    return decoder.decode(found, find_heads(found))


def nested(table: dict[str, Any], column: str) -> list[list[dict[str, Any]]]:
    """A list column as lists of rows."""
    offsets, children = table[column]
    names = list(children)
    return [
        [{name: children[name][at] for name in names} for at in range(lo, hi)]
        for lo, hi in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def spans(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(int(item["start"]), int(item["end"])) for item in rows]


# ---- pointers ----------------------------------------------------------------------------------------------


def test_ids_are_a_permutation_that_keeps_zero() -> None:
    pointers = np.concatenate(
        [np.arange(0, 100_000, dtype=np.uint64), np.arange(2**64 - 100_000, 2**64, dtype=np.uint64)]
    )
    ids = Cloak()(pointers)
    assert len(np.unique(ids)) == len(pointers)
    assert ids[0] == 0
    assert (ids[1:] != 0).all()
    assert pointers[1] == 1, "the words given are left alone"


def test_ids_keep_neither_order_nor_distance() -> None:
    pointers = np.uint64(0xFFFF888000000000) + np.arange(10_000, dtype=np.uint64) * np.uint64(176)
    ids = Cloak()(pointers)
    rising = np.mean(ids[1:] > ids[:-1])
    assert 0.3 < rising < 0.7
    assert len(np.unique(np.diff(ids))) > 9_900
    assert len(np.unique(ids >> np.uint64(48))) > 8_000
    assert len(np.unique(ids & np.uint64(0xFFFF))) > 8_000


def test_one_key_gives_the_same_id_and_two_keys_do_not() -> None:
    pointers = np.arange(1, 1000, dtype=np.uint64) * np.uint64(64)
    one, other = Cloak(), Cloak()
    assert (one(pointers) == one(pointers.reshape(3, -1)).reshape(-1)).all()
    assert (one(pointers) != other(pointers)).all()


def test_ids_do_not_tell_the_key_by_exclusive_or() -> None:
    one = Cloak()
    pointers = np.arange(1, 1000, dtype=np.uint64) * np.uint64(4096)
    assert len(np.unique(one(pointers) ^ pointers)) == 999


def test_no_pointer_reaches_the_tables() -> None:
    secret = 0xFFFF888012345680
    tables = decode(
        Decoder(Cloak()),
        section(
            row(BEFORE, 4096, 8192, bits=EXTRA, object=secret, anon_vma=secret, file=secret),
            extra(BEFORE, uffd=secret),
            evidence((STORE, secret, 1, 2), (ALLOC, secret, 0, 0)),
            cover(BEFORE, 0, 8192, 1),
        ),
        file(b"x\0/\0", pointer=secret),
    )
    pointers = [
        (name, field.name) for name, fields in TABLES.items() for field in fields if field.pointer and name in tables
    ]
    assert pointers == [("files", "file")]
    values = [tables["files"]["file"]]
    for column, names in (("before", ("object", "anon_vma", "file", "uffd")), ("evidence", ("object",))):
        values += [tables["sections"][column][1][name] for name in names]
    ids = np.concatenate(values)
    assert len(ids) == 7
    assert len(np.unique(ids)) == 1
    assert int(ids[0]) not in (0, secret)


# ---- sections ----------------------------------------------------------------------------------------------


def test_rows_belong_to_their_walks_and_sections() -> None:
    tables = decode(
        Decoder(Clear()),
        section(
            row(BEFORE, 0x1000, 0x2000),
            row(BEFORE, 0x2000, 0x3000),
            cover(BEFORE, 0, 0x4000, 2, 11, 12, 13, 14, 15),
            cover(BEFORE, 0x9000, 0xA000, 0, 99, 99, 99, 99, 99),
            row(AFTER, 0x1000, 0x3000),
            cover(AFTER, 0, 0x4000, 1, 21, 22, 23, 24, 25),
            seq=3,
            nr=10,
            op_class=1,
            word6=77,
        ),
        call(result=-12, args=(1, 2, 3, 4, 5, 6), nr=10),
        section(cover(AFTER, 0, 0, 0, 31, 32, 33, 34, 35), seq=4),
    )
    sections = tables["sections"]
    assert [spans(rows) for rows in nested(sections, "before")] == [[(0x1000, 0x2000), (0x2000, 0x3000)], []]
    assert [spans(rows) for rows in nested(sections, "after")] == [[(0x1000, 0x3000)], []]
    assert [[int(c["rows"]) for c in covers] for covers in nested(sections, "before_cover")] == [[2, 0], []]
    assert [spans(covers) for covers in nested(sections, "after_cover")] == [[(0, 0x4000)], [(0, 0)]]
    assert sections["acquired"].tolist() == [11, 0], "of the first walk; none without a walk"
    assert sections["start_brk"].tolist() == [15, 0]
    assert sections["map_count"].tolist() == [21, 31], "of the last walk"
    assert sections["locked_vm"].tolist() == [25, 35]
    assert sections["brk"].tolist() == [77, 0]
    assert sections["seq"].tolist() == [3, 4]
    assert sections["nr"].tolist() == [10, 0]
    assert (sections["pid"].tolist(), sections["tid"].tolist()) == ([77, 77], [78, 78])
    assert sections["parts"].tolist() == [1, 1]
    assert tables["calls"]["result"].tolist() == [-12]
    assert [int(tables["calls"][f"arg{n}"][0]) for n in range(6)] == [1, 2, 3, 4, 5, 6]
    assert sections["index"].tolist() == [2, 6]
    assert tables["calls"]["index"].tolist() == [4]


def test_rare_attributes_stay_with_their_row() -> None:
    tables = decode(
        Decoder(Clear()),
        section(
            row(BEFORE, 1, 2),
            row(BEFORE, 2, 3, bits=EXTRA | 1),
            extra(BEFORE, uffd=5, policy=6, name=b"heap\0rubbish"),
            row(AFTER, 3, 4, bits=EXTRA),
            extra(AFTER, name=b"\xff\n"),
            row(BEFORE, 4, 5),
        ),
    )
    before, after = nested(tables["sections"], "before")[0], nested(tables["sections"], "after")[0]
    assert [int(item["uffd"]) for item in before] == [0, 5, 0]
    assert [int(item["policy"]) for item in before] == [0, 6, 0]
    assert [item["name"] for item in before] == ["", "heap", ""]
    assert [int(item["bits"]) for item in before] == [0, 1, 0], "the mark itself is no attribute"
    assert after[0]["name"] == "\\xff\n"


def test_evidence_comes_in_pairs_and_odd_ones_in_order() -> None:
    tables = decode(
        Decoder(Clear()),
        section(evidence((ALLOC, 7, 0, 0), (STORE, 7, 0x1000, 0x2000)), evidence((STORE, 8, 0x2000, 0x3000))),
        section(),
        section(evidence((STORE, 9, 1, 2))),
    )
    found = nested(tables["sections"], "evidence")
    assert [[(int(e["what"]), int(e["object"]), int(e["start"])) for e in events] for events in found] == [
        [(ALLOC, 7, 0), (STORE, 7, 0x1000), (STORE, 8, 0x2000)],
        [],
        [(STORE, 9, 1)],
    ]


def test_a_new_program_is_named() -> None:
    name = int.from_bytes(b"ba\ns\xffh\0\0", "little")
    tables = decode(Decoder(Clear()), section(kind="EXEC", word7=name), section(word7=name))
    assert tables["sections"]["comm"] == ["ba\ns\\xffh", ""]


def test_nothing_gives_no_tables() -> None:
    assert decode(Decoder(Clear())) == {}


def test_the_index_goes_on_from_batch_to_batch() -> None:
    decoder = Decoder(Clear())
    assert decode(decoder, call(), section())["sections"]["index"].tolist() == [4]
    assert decode(decoder) == {}
    assert decode(decoder, call())["calls"]["index"].tolist() == [6]
    assert decoder.records == 3


# ---- parts -------------------------------------------------------------------------------------------------


def part(number: int, *body: Cell, last: bool = False, **more: int) -> list[Cell]:
    return section(*body, part=number, flags=0 if last else PARTIAL, **more)


PARTS = (
    part(0, row(BEFORE, 0, 1), row(BEFORE, 1, 2), seq=5),
    part(1, cover(BEFORE, 0, 9, 2, 41), evidence((STORE, 7, 0, 1)), row(AFTER, 0, 1), seq=5),
    part(2, row(AFTER, 1, 2), cover(AFTER, 0, 9, 2, 42), last=True, seq=5, nr=9),
)


def assert_joined(table: dict[str, Any]) -> None:
    assert table["parts"].tolist() == [3]
    assert table["nr"].tolist() == [9]
    assert spans(nested(table, "before")[0]) == spans(nested(table, "after")[0]) == [(0, 1), (1, 2)]
    assert (table["acquired"].tolist(), table["map_count"].tolist()) == ([41], [42])
    assert len(nested(table, "evidence")[0]) == 1


def test_parts_are_joined() -> None:
    decoder = Decoder(Clear())
    tables = decode(decoder, call(), *PARTS, call())
    assert_joined(tables["sections"])
    assert tables["sections"]["index"].tolist() == [8], "the place of its last part"
    assert tables["calls"]["index"].tolist() == [2, 10]
    assert (decoder.records, decoder.dropped) == (5, 0)


@pytest.mark.parametrize("cut", [1, 2])
def test_parts_are_joined_across_batches(cut: int) -> None:
    decoder = Decoder(Clear())
    assert "sections" not in decode(decoder, *PARTS[:cut], call())
    assert_joined(decode(decoder, call(), *PARTS[cut:])["sections"])
    assert decoder.dropped == 0


def test_parts_of_two_address_spaces_do_not_mix() -> None:
    other = (part(0, row(AFTER, 7, 8), space=2, seq=5), part(1, row(AFTER, 8, 9), last=True, space=2, seq=5))
    tables = decode(Decoder(Clear()), PARTS[0], other[0], PARTS[1], other[1], PARTS[2], section(space=3))
    assert tables["sections"]["space"].tolist() == [2, 1, 3]
    assert tables["sections"]["parts"].tolist() == [2, 3, 1]
    assert [spans(rows) for rows in nested(tables["sections"], "after")] == [
        [(7, 8), (8, 9)],
        [(0, 1), (1, 2)],
        [],
    ]


def test_a_file_between_parts_tells_nothing_of_them() -> None:
    text = bytes([AFTER, *[0] * 63]) * 15
    tables = decode(Decoder(Clear()), PARTS[0], file(text), PARTS[1], PARTS[2])
    assert_joined(tables["sections"])


@pytest.mark.parametrize(("lost", "dropped"), [((0,), 2), ((1,), 2), ((2,), 2), ((0, 1), 1), ((0, 2), 1)])
def test_a_section_that_lost_a_part_is_dropped_whole(lost: tuple[int, ...], dropped: int) -> None:
    decoder = Decoder(Clear())
    there = [piece for number, piece in enumerate(PARTS) if number not in lost]
    tables = decode(decoder, *there, part(0, row(AFTER, 3, 4), seq=6), part(1, last=True, seq=6))
    assert tables["sections"]["seq"].tolist() == [6]
    assert spans(nested(tables["sections"], "after")[0]) == [(3, 4)]
    assert decoder.dropped == dropped


def test_a_whole_section_after_a_broken_one_stays() -> None:
    decoder = Decoder(Clear())
    assert "sections" not in decode(decoder, PARTS[0], PARTS[1])
    tables = decode(decoder, section(row(AFTER, 3, 4), seq=6))
    assert tables["sections"]["seq"].tolist() == [6]
    assert decoder.dropped == 2


# ---- files -------------------------------------------------------------------------------------------------


def test_text_of_a_path_is_taken_for_no_row() -> None:
    cell = b"".join(word.to_bytes(8, "little") for word in row(AFTER, 0x1000, 0x2000))
    path = b"\0" * 56 + cell * 10
    tables = decode(Decoder(Clear()), section(row(AFTER, 3, 4)), file(path), section(row(AFTER, 4, 5)))
    assert [spans(rows) for rows in nested(tables["sections"], "after")] == [[(3, 4)], [(4, 5)]]


def test_text_of_a_path_hides_no_row_behind_it() -> None:
    """A cell of the text that looks like the head of one more file record."""
    forged = np.array(cells.head("FILE", 18), dtype=np.uint64).tobytes()
    path = b"\0" * 56 + forged * 15
    tables = decode(Decoder(Clear()), section(), file(path), section(*[row(AFTER, n, n + 1) for n in range(9)]))
    assert [len(rows) for rows in nested(tables["sections"], "after")] == [0, 9]


def test_files_are_described() -> None:
    record = file(b"b\nad\0dir\0\0", bits=1, fs_magic=0xEF53, word6=0o100644 << 32 | 8 << 20 | 1)
    record[0][1] |= 3 << 8
    record[0][4] = 1234
    files = decode(Decoder(Clear()), record)["files"]
    assert files["path"] == ["/dir/b\nad (deleted)"]
    assert (int(files["dev"][0]), int(files["ino"][0])) == (8 << 20 | 1, 1234)
    assert (int(files["mode"][0]), int(files["hooks"][0])) == (0o100644, 3)
    assert int(files["fs_magic"][0]) == 0xEF53


@pytest.mark.parametrize(
    ("names", "bits", "magic", "path"),
    [
        ([b"c", b"b", b"a"], 0, 0xEF53, "/a/b/c"),
        ([b"c", b"b", b"", b"/"], 0, 0xEF53, "/b/c"),
        ([b"gone"], 1, 0xEF53, "/gone (deleted)"),
        ([b"memfd:x"], 3, 0x01021994, "/memfd:x (deleted)"),
        ([b"[io_uring]"], 2, ANON_INODE_FS, "anon_inode:[io_uring]"),
        ([b"\xff\xfe"], 0, 0xEF53, "/\\xff\\xfe"),
        ([b"\xc3\xa9\x1b[2J\n"], 0, 0xEF53, "/\u00e9\x1b[2J\n"),
        ([], 0, 0xEF53, "/"),
    ],
)
def test_a_path_reads_as_maps_shows_it(names: list[bytes], bits: int, magic: int, path: str) -> None:
    assert path_of(names, bits, magic) == path


def test_a_task_tells_what_its_kind_has() -> None:
    fork = [
        cells.head("FORK", 2, word6=1 | 5 << 32, word7=77 << 32 | 78, space=2),
        [cells.CELLS["CELL_ARGS"], 1, 2, 3, 4, 5, 6, 7],
    ]
    leave = [cells.head("TASK_EXIT", 2, word6=9), [cells.CELLS["CELL_ARGS"], 1, 1, 1, 1, 1, 1, 1]]
    tasks = decode(Decoder(Clear()), fork, leave)["tasks"]
    assert tasks["kind"].tolist() == [KINDS["FORK"], KINDS["TASK_EXIT"]]
    assert tasks["parent_space"].tolist() == [1, 0]
    assert tasks["parent_seq"].tolist() == [5, 0]
    assert tasks["parent_tid"].tolist() == [78, 0]
    assert tasks["exit_code"].tolist() == [0, 9]
    assert tasks["map_count"].tolist() == [1, 0]
    assert tasks["brk"].tolist() == [7, 0]
