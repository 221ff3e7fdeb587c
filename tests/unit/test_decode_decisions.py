"""Records of the decisions layer become rows: proposals, neighbours, descriptors, answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests import cells
from tests.cells import Cell, call, cells_of, extra, file, row, section
from vmatrace.capture.decode import Cloak, Decoder
from vmatrace.capture.decode_decisions import SymbolNames
from vmatrace.capture.ring import find_heads
from vmatrace.schema import CELLS, DECISIONS, ROLES, ROW_BITS, TABLES

NOMEM = 12
VMA = 0xFFFF888001000040


def decision(what: str, *body: Cell, answer: int = 0, probe: int = 0, **asked: int) -> list[Cell]:
    """A record: head, proposal, and the cells behind."""
    head = cells.head("DECISION", 2 + len(body), flags=DECISIONS[what], part=probe, word6=answer % 2**64, word7=900)
    word = (
        CELLS["CELL_PROPOSAL"] | asked.get("state", 0) << 8 | asked.get("bits", 0) << 16 | asked.get("order", 0) << 32
    )
    fields = ("start", "end", "flags", "pgoff", "file", "anon_vma", "delta")
    return [head, [word, *(asked.get(name, 0) % 2**64 for name in fields)], *body]


def neighbour(role: str, start: int, end: int, bits: int = 0, **more: int) -> Cell:
    cell = row(CELLS["CELL_NEIGHBOUR"], start, end, bits, **more)
    cell[0] |= ROLES[role] << 8
    return cell


def decoded(*records: list[Cell], hooks: tuple[str, ...] = ("",)) -> dict[str, Any]:
    decoder = Decoder(Cloak())
    decoder.expect_decisions(hooks)
    words = cells_of(*records)
    return decoder.decode(words, find_heads(words))


def test_a_refused_merge_keeps_its_neighbours_in_order() -> None:
    record = decision(
        "MERGE_NEW",
        neighbour("ROLE_PREV", 0x1000, 0x2000),
        neighbour("ROLE_NEXT", 0x3000, 0x4000, ROW_BITS["ROW_EXTRA"]),
        extra(CELLS["CELL_EXTRA"], 0, 5, b"[anon:x]"),
        state=2, bits=33, order=9, start=0x2000, end=0x3000, flags=0x73, pgoff=2,
    )  # fmt: skip
    table = decoded(call(), record, section(row(cells.BEFORE, 0, 4096)), call())["decisions"]
    assert (table["what"][0], table["state"][0], table["bits"][0], table["order"][0]) == (1, 2, 33, 9)
    assert (table["start"][0], table["end"][0], table["result"][0], table["error"][0]) == (0x2000, 0x3000, 0, 0)
    offsets, rows = table["rows"]
    assert offsets.tolist() == [0, 2]
    assert rows["role"].tolist() == [ROLES["ROLE_PREV"], ROLES["ROLE_NEXT"]]
    assert rows["name"] == ["", "[anon:x]"]
    assert rows["policy"].tolist() == [0, 5]
    assert not rows["anon_pgoff"].any()
    assert table["index"].tolist() == [4], "one order with the other records"


def test_an_answer_is_an_object_or_a_number() -> None:
    table = decoded(
        decision("MERGE_EXISTING", answer=VMA),
        decision("MERGE_EXISTING", answer=-NOMEM),
        decision("SPLIT", answer=-NOMEM),
        decision("MERGE_NEW", answer=0),
    )["decisions"]
    assert table["error"].tolist() == [0, -NOMEM, -NOMEM, 0]
    assert table["result"][0] not in (0, VMA)
    assert table["result"][1:].tolist() == [0, 0, 0]


def test_pointers_are_the_ids_that_they_have_elsewhere() -> None:
    tables = decoded(
        section(row(cells.BEFORE, 0x1000, 0x2000, object=VMA, file=0xFFFF888002000000)),
        decision("SPLIT", neighbour("ROLE_SOURCE", 0x1000, 0x2000, object=VMA), file=0xFFFF888002000000, answer=0),
        decision("VMA_DUP", answer=VMA),
    )
    table, before = tables["decisions"], tables["sections"]["before"][1]
    assert table["rows"][1]["object"][0] == before["object"][0] == table["result"][1]
    assert table["file"][0] == before["file"][0]


def test_a_descriptor_before_and_after_its_hook(tmp_path: Path) -> None:
    def descriptor(after: int, flags: int, ops: int) -> Cell:
        word = CELLS["CELL_DESCRIPTOR"] | after << 8 | 3 << 16
        return [word, 0x1000, 0x3000, 7, flags, ops, 0, 0xFFFF888002000000]

    record = decision("MMAP_PREPARE", descriptor(0, 1, 0), descriptor(1, 0x41, 0), probe=1, delta=-8)
    table = decoded(record, hooks=("", "ext4_file_mmap_prepare"))["decisions"]
    offsets, descs = table["descs"]
    assert offsets.tolist() == [0, 2]
    assert descs["flags"].tolist() == [1, 0x41]
    assert descs["action"].tolist() == [3, 3]
    assert descs["hook"] == ["ext4_file_mmap_prepare"] * 2
    assert descs["ops"] == ["", ""]
    assert table["delta"].tolist() == [-8]
    assert descs["file"][0] not in (0, 0xFFFF888002000000)


def test_anon_pgoff_of_the_proposal_and_of_each_role() -> None:
    pgoffs = [CELLS["CELL_ANON_PGOFF"], 100, 101, 102, 103, 104, 105, 106]
    record = decision(
        "MERGE_NEW", neighbour("ROLE_PREV", 0, 4096), neighbour("ROLE_RESULT", 0, 8192), pgoffs, start=4096
    )
    table = decoded(decision("BRK"), record)["decisions"]
    assert table["anon_pgoff"].tolist() == [0, 100]
    assert table["rows"][1]["anon_pgoff"].tolist() == [101, 105]


def test_what_few_proposals_have() -> None:
    aside = extra(CELLS["CELL_ASIDE"], 0xFFFF888003000000, 6, b"[anon:y]")
    aside[0] = CELLS["CELL_ASIDE"]
    table = decoded(decision("MERGE_NEW"), decision("MERGE_EXISTING", aside))["decisions"]
    assert table["policy"].tolist() == [0, 6]
    assert table["name"] == ["", "[anon:y]"]
    assert table["uffd"].tolist()[0] == 0
    assert table["uffd"].tolist()[1] not in (0, 0xFFFF888003000000)


def test_a_name_that_looks_like_cells_is_no_decision() -> None:
    text = bytes([CELLS["CELL_NEIGHBOUR"]]) * 200 + b"\0"
    tables = decoded(decision("BRK"), file(text), decision("BRK", neighbour("ROLE_PREV", 0, 4096)))
    assert tables["decisions"]["rows"][0].tolist() == [0, 0, 1]


def test_no_kernel_address_is_left() -> None:
    record = decision("SPLIT", neighbour("ROLE_SOURCE", 0, 4096, object=VMA), file=VMA, anon_vma=VMA, answer=VMA)
    table = decoded(record)["decisions"]
    for field in TABLES["decisions"]:
        if field.pointer:
            assert not np.isin(table[field.name], [VMA]).any(), field.name
    assert VMA not in table["rows"][1]["object"]


def test_symbols_are_looked_up_once(tmp_path: Path) -> None:
    kallsyms = tmp_path / "kallsyms"
    kallsyms.write_text("ffffffff82000000 d ext4_file_vm_ops\nffffffff82000080 d some_vm_ops\t[module]\n")
    names = SymbolNames(kallsyms)
    assert names([0, 0xFFFFFFFF82000080, 0xFFFFFFFF82000000, 0xFFFFFFFF82000001]) == [
        "", "some_vm_ops", "ext4_file_vm_ops", "?",
    ]  # fmt: skip
    kallsyms.unlink()
    assert names([0xFFFFFFFF82000000, 0xFFFFFFFF82000001]) == ["ext4_file_vm_ops", "?"]
