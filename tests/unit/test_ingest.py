"""Records become operations: matched, numbered, counted, told apart."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.tracebuilder import READ, WRITE, ToyKernel
from vmatrace.errors import BadTrace
from vmatrace.ingest import Trace, errno_name
from vmatrace.ingest.effects import (
    ALLOC,
    DUP,
    EFFECTS,
    FREED,
    MERGED,
    STORE,
    UNMAPPED,
    Evidence,
    count_effects,
    interpret,
)
from vmatrace.ingest.losses import CpuNumbers
from vmatrace.ingest.objects import UNBORN, ObjectIds
from vmatrace.ingest.states import paint
from vmatrace.ingest.vanished import section_effects
from vmatrace.schema import KINDS, OP_CLASSES
from vmatrace.syscalls import call_name, find_call, op_classes, system_calls
from vmatrace.tracefile import TraceFile, TraceWriter

RANGE, MREMAP, BRK, FAULT = (OP_CLASSES["OP_" + name] for name in ("RANGE", "MREMAP", "BRK", "FAULT"))


def evidence(text: str) -> list[Evidence]:
    """``dup 2, store 2 0-10, merged 1``: numbers are objects, ranges are as they stand."""
    words = {
        "store": STORE,
        "alloc": ALLOC,
        "dup": DUP,
        "merged": MERGED,
        "unmapped": UNMAPPED,
        "freed": FREED,
    }
    found = []
    for item in text.split(", "):
        what, obj, *span = item.split()
        lo, hi = (int(n) for n in span[0].split("-")) if span else (0, 0)
        found.append(Evidence(words[what], int(obj), lo, hi))
    return found


# Object 1 is [0, 30), object 2 is [30, 60).
BEFORE = [(1, 0, 30), (2, 30, 60)]
CASES = [
    # text, op class, span, (kind, side or new_side, survivor or cut object, victims)
    ("alloc 9, store 9 70-80", RANGE, None, [("new", None, 9, ())]),
    ("dup 9, store 9 10-30", RANGE, (10, 30), [("split", "above", 1, ())]),
    ("dup 9, store 9 0-10", RANGE, (10, 30), [("split", "below", 1, ())]),
    ("store 1 0-60, merged 2", RANGE, (30, 60), [("merge", "left", 1, (2,))]),
    ("store 1 0-40", RANGE, (30, 40), [("merge", "left", 1, ())]),
    ("store 2 20-60", RANGE, (20, 30), [("merge", "right", 2, ())]),
    ("unmapped 2", RANGE, (30, 60), [("unmap", None, 2, ())]),
    ("dup 9, freed 9", RANGE, None, []),
    ("dup 9, store 9 80-110", MREMAP, None, [("copy", None, 9, ())]),
    ("dup 9, store 9 10-20", MREMAP, None, [("copy", None, 9, ())]),
    ("dup 9, store 9 10-30", MREMAP, None, [("split", "above", 1, ())]),
    ("store 2 20-60, dup 9, store 9 20-50, unmapped 2", MREMAP, None,
     [("merge", "right", 2, ()), ("split", "below", 2, ()), ("unmap", None, 2, ())]),
    ("alloc 9", BRK, None, [("new", None, 9, ())]),
    ("store 2 30-80", BRK, None, [("merge", "left", 2, ()), ("grow", None, 2, ())]),
    ("store 1 0-30", FAULT, None, [("grow", None, 1, ())]),
    ("dup 9, store 9 0-10, dup 8, store 8 20-30, unmapped 1, store 9 0-30, merged 8", RANGE, (10, 20),
     [("split", "below", 1, ()), ("split", "above", 1, ()), ("unmap", None, 1, ()),
      ("merge", "both", 9, (8,))]),
    ("store 1 0-60, freed 2", RANGE, (30, 60), [("merge", "left", 1, (2,))]),
    ("freed 2", RANGE, (30, 60), [("unmap", None, 2, ())]),
    # arm64 tells no cause: what lay where the call maps was unmapped, and the neighbour then grew over it.
    ("store 1 0-60, freed 2", OP_CLASSES["OP_MMAP"], (30, 60), [("unmap", None, 2, ()), ("merge", "left", 1, ())]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "op_class", "span", "expected"), CASES, ids=[case[0] for case in CASES])
def test_the_effects_of_one_section(text: str, op_class: int, span: Any, expected: Any) -> None:
    found = interpret(op_class, BEFORE, evidence(text), span)
    assert [(e.kind, e.side or e.new_side, e.obj, e.victims) for e in found] == expected


@pytest.mark.parametrize(("call", "kinds"), [("remap_file_pages", ["unmap", "merge"]), ("mprotect", ["merge"])])
def test_remap_file_pages_unmaps_what_it_maps_anew(call: str, kinds: list[str]) -> None:
    walk = SimpleNamespace(vmas=[SimpleNamespace(obj=obj, start=lo, end=hi) for obj, lo, hi in BEFORE])
    number = next(entry.nr for (abi, _), entry in system_calls("aarch64").items() if (abi, entry.name) == (0, call))
    section: Any = SimpleNamespace(
        op_class=RANGE, abi=0, nr=number, before=[walk], evidence=evidence("store 1 0-60, freed 2"), grew=False
    )
    found = section_effects("aarch64", section, (30, 30, 0, 0, 0), 0, 1, deaths=True)
    assert [effect.kind for effect in found] == kinds


def sections_table(tmp_path: Path, sections: list[tuple[int, list[Evidence]]]) -> Any:
    def nested(rows: list[list[Any]], names: tuple[str, ...]) -> Any:
        offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
        flat = [item for row in rows for item in row]
        return offsets, {
            name: np.array([item[at] for item in flat], np.uint64) for at, name in enumerate(names)
        }

    with TraceWriter(tmp_path / "t", {}, force=True) as writer:
        writer.write(
            {
                "sections": {
                    "op_class": [op_class for op_class, _ in sections],
                    "before": nested([BEFORE] * len(sections), ("object", "start", "end")),
                    "evidence": nested([items for _, items in sections], ("what", "object", "start", "end")),
                }
            }
        )
    return next(TraceFile(tmp_path / "t").batches())["sections"]


def shrinks(items: list[Evidence]) -> bool:
    """Whether a VMA is stored inside its own old range, which kernels from 6.3 on never do."""
    ranges = {obj: (lo, hi) for obj, lo, hi in BEFORE}
    for item in items:
        if item.what in (ALLOC, DUP):
            ranges.pop(item.obj, None)
        elif item.what == STORE:
            lo, hi = ranges.get(item.obj, (1, 0))
            if lo <= item.start and item.end <= hi:
                return True
            for other, (start, end) in ranges.items():
                if start < item.end and item.start < end and other != item.obj:
                    ranges[other] = (start, item.start) if start < item.start else (item.end, end)
            ranges[item.obj] = (item.start, item.end)
    return False


def test_counting_many_sections_agrees_with_telling_each(tmp_path: Path) -> None:
    rng = random.Random(7)
    sections = [(op_class, evidence(text)) for text, op_class, _, _ in CASES]
    for _ in range(300):
        items = []
        for _ in range(rng.randrange(7)):
            lo = rng.randrange(60)
            items.append(
                Evidence(
                    rng.choice([STORE, STORE, ALLOC, DUP, MERGED, UNMAPPED]),
                    rng.randrange(1, 5),
                    lo,
                    lo + rng.randrange(1, 30),
                )
            )
        sections.append((rng.choice([RANGE, BRK, MREMAP]), items))
    # Births that are stored at once, as they mostly are: the fast way.
    for _ in range(300):
        items = []
        for obj in range(10, 10 + rng.randrange(4)):
            lo = rng.randrange(90)
            items += [Evidence(rng.choice([ALLOC, DUP]), obj, 0, 0), Evidence(STORE, obj, lo, lo + 9)]
        items += [Evidence(rng.choice([STORE, UNMAPPED]), rng.choice([1, 2]), 0, 60)]
        sections.append((rng.choice([RANGE, BRK, MREMAP]), items))
    table = sections_table(tmp_path, sections)
    counts, _ = count_effects(table)
    for number, (op_class, items) in enumerate(sections):
        told = interpret(op_class, BEFORE, items)
        expected = {name: sum(effect.kind == name for effect in told) for name in EFFECTS[:-1]}
        if all(item.what != MERGED for item in items) and not shrinks(items):
            assert {name: int(counts[name][number]) for name in EFFECTS[:-1]} == expected, (op_class, items)


def test_deaths_that_are_not_seen_are_told_from_what_is_left() -> None:
    def told(text: str, left: set[int], op_class: int = RANGE, span: Any = (30, 60)) -> Any:
        found = interpret(op_class, BEFORE, evidence(text) if text else [], span, left=left)
        return [(e.kind, e.obj, e.victims) for e in found]

    assert told("", {1}) == [("unmap", 2, ())]
    assert told("store 1 0-60", {1}) == [("merge", 1, (2,))]
    assert told("store 1 0-60", {1}, OP_CLASSES["OP_MMAP"]) == [("unmap", 2, ()), ("merge", 1, ())]
    # Before 6.3 the piece that stays is stored, too: a cut from below, then the rest is unmapped.
    assert told("dup 9, store 2 40-60, store 9 30-40", {1, 2}) == [("split", 2, ()), ("unmap", 9, ())]


def test_a_stack_that_grows_inside_a_call_is_a_fault_of_its_own(tmp_path: Path) -> None:
    assert interpret(OP_CLASSES["OP_NONE"], [], evidence("store 1 0-30"), stack_grew=True)[0].kind == "grow"


def test_objects_that_share_an_address_get_ids_of_their_own() -> None:
    ids = ObjectIds(np.array([8, 16, 8], np.uint64), np.array([1, 1, 1]), np.array([0, 0, 3]))

    def ask(births: int) -> list[int]:
        found = ids.ids(np.array([8, 16, 0, 99], np.uint64), np.full(4, 1), np.full(4, births))
        return [int(value) for value in found]

    early, middle, late = ask(0), ask(2), ask(3)
    assert middle[:3] == [1, 2, 0]
    assert late[:3] == [3, 2, 0]
    assert min(early[0], early[1], early[3]) >= UNBORN
    assert early[3] == late[3]
    other = ids.ids(np.array([8], np.uint64), np.array([2]), np.array([3]))
    assert other[0] not in (*early, *middle, *late)


def test_paint_shows_the_latest_interval() -> None:
    picture = paint(np.array([0, 2, 4], np.uint64), np.array([10, 5, 6], np.uint64), np.array([7, 8, 9]))
    assert list(zip(picture.start.tolist(), picture.end.tolist(), picture.source.tolist(), strict=True)) == [
        (0, 2, 7),
        (2, 4, 8),
        (4, 6, 9),
        (6, 10, 7),
    ]


def numbered(rows: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Gaps of one CPU's records given as (seq, index, parts)."""

    class Fake(dict):  # type: ignore[type-arg]
        rows = 0

    seq, index, parts = (np.array(column) for column in zip(*rows, strict=True))
    sections = Fake(cpu=np.zeros(len(rows)), cpu_seq=seq, index=index, parts=parts)
    sections.rows = len(rows)
    numbers = CpuNumbers()
    tables: Any = dict.fromkeys(("calls", "tasks", "faults", "files"), Fake())
    numbers.add({**tables, "sections": sections})
    return numbers.gaps()


@pytest.mark.parametrize(
    ("rows", "gaps"),
    [
        ([(1, 10, 1), (2, 20, 1), (3, 30, 1)], []),
        ([(1, 10, 1), (3, 30, 1)], [(10, 30)]),
        ([(1, 10, 1), (3, 30, 2)], []),  # the section came in two records
        ([(1, 10, 1), (4, 30, 2)], [(10, 30)]),
        ([(2, 20, 1), (1, 10, 1), (3, 30, 1)], []),  # out of order in the file
        ([(1, 10, 1), (4, 30, 1), (5, 40, 3)], []),  # two parts, a file's description, the last part
    ],
)
def test_a_number_that_never_came_proves_a_loss(rows: Any, gaps: Any) -> None:
    assert numbered(rows) == gaps


def toy(tmp_path: Path, **options: Any) -> tuple[ToyKernel, Trace]:
    kernel = ToyKernel()
    space = kernel.start((4, 8, READ))
    kernel.map(space, 20, 24, READ | WRITE)
    kernel.protect(space, 21, 22, READ)
    child = kernel.fork(space)
    kernel.unmap(child, 20, 24)
    kernel.exit(child)
    kernel.exit(space)
    return kernel, Trace(kernel.write(tmp_path / "toy", **options))


def test_operations_are_numbered_in_each_address_space(tmp_path: Path) -> None:
    _, trace = toy(tmp_path)
    assert [(op.space, op.n, op.kind, op.name) for op in trace.iter_operations(1)] == [
        (1, 0, "exec", "execve"), (1, 1, "call", "mmap"), (1, 2, "call", "mprotect"), (1, 3, "call", "fork"),
        (1, 4, "exit", "exit"),
    ]  # fmt: skip
    assert [(op.n, op.kind, op.name) for op in trace.iter_operations(2)] == [
        (0, "fork", "fork"), (1, "call", "munmap"), (2, "exit", "exit"),
    ]  # fmt: skip
    everything = [op.index for op in trace.iter_operations()]
    assert everything == sorted(everything)
    with pytest.raises(KeyError, match="no operation 9"):
        trace.operation_row(1, 9)


def test_an_operation_knows_its_call_and_its_sections(tmp_path: Path) -> None:
    _, trace = toy(tmp_path)
    operation = trace.operation(trace.operation_row(1, 2))
    assert operation.args == {"start": 21 * 4096, "len": 4096, "prot": READ}
    assert operation.result == 0
    (section,) = operation.sections
    assert [vma.start for walk in section.before for vma in walk.vmas] == [20 * 4096]
    assert len(section.after[0].vmas) == 3
    assert [(e.kind, e.new_side) for e in operation.detail] == [("split", "below"), ("split", "above")]
    assert operation.effects["split"] == 2
    assert operation.changed
    assert not operation.miscounted
    assert trace.spaces[2].origin == "fork"
    assert trace.spaces[2].parent == 1
    assert trace.operation(trace.operation_row(2, 0)).effects["copy"] == 4


def test_a_lost_section_is_noticed_by_its_number(tmp_path: Path) -> None:
    kernel, _ = toy(tmp_path)
    at = next(i for i, (t, r) in enumerate(kernel.records) if t == "sections" and r["seq"] == 3)
    trace = Trace(kernel.write(tmp_path / "lossy", drop=lambda n: n == at))
    assert trace.lost_records
    assert trace.records.gaps
    fork = next(op for op in trace.iter_operations(1) if op.name == "fork")
    assert fork.reason == "lost records"
    assert fork.sections[0].lost_before


def test_a_section_whose_call_is_lost_is_of_no_known_cause(tmp_path: Path) -> None:
    kernel, _ = toy(tmp_path)
    at = next(i for i, (t, r) in enumerate(kernel.records) if t == "calls" and r["seq"] == 3)
    trace = Trace(kernel.write(tmp_path / "lossy", drop=lambda n: n == at))
    (other,) = [op for op in trace.iter_operations() if op.kind == "other"]
    assert other.name == "mprotect"
    assert other.reason == "lost records"
    assert other.changed


def test_a_wrong_count_of_vmas_is_noticed(tmp_path: Path) -> None:
    kernel, _ = toy(tmp_path)
    row = next(r for t, r in kernel.records if t == "sections" and r["seq"] == 3)
    row["map_count"] += 1
    trace = Trace(kernel.write(tmp_path / "wrong"))
    assert [op.name for op in trace.iter_operations() if op.miscounted] == ["mprotect"]


def test_records_out_of_order_in_the_file_are_put_in_order(tmp_path: Path) -> None:
    kernel, trace = toy(tmp_path)
    expected = [(op.space, op.n, op.name, dict(op.effects)) for op in trace.iter_operations()]
    random.Random(3).shuffle(kernel.records)
    mixed = Trace(kernel.write(tmp_path / "mixed", batch=4))
    assert [(op.space, op.n, op.name, dict(op.effects)) for op in mixed.iter_operations()] == expected
    assert [[len(s.before), len(s.after)] for op in mixed.iter_operations() for s in op.sections] == [
        [len(s.before), len(s.after)] for op in trace.iter_operations() for s in op.sections
    ]


def test_walks_that_claim_rows_which_are_not_there_are_refused(tmp_path: Path) -> None:
    kernel, _ = toy(tmp_path)
    row = next(r for t, r in kernel.records if t == "sections" and r["seq"] == 3)
    row["after_cover"][0]["rows"] = 10**6
    with pytest.raises(BadTrace, match="do not fit together"):
        Trace(kernel.write(tmp_path / "wrong"))


def test_an_altered_trace_with_any_number_changed_still_opens_or_is_refused(tmp_path: Path) -> None:
    toy(tmp_path, batch=1000)
    with pa.ipc.open_stream(str(tmp_path / "toy")) as stream:
        table = stream.read_all()
    rng = random.Random(5)
    for _ in range(60):
        rows = table.to_pylist()
        records = rows[0][rng.choice(["sections", "calls", "tasks"])]
        record = rng.choice(records)
        name = rng.choice([name for name, value in record.items() if isinstance(value, int)])
        record[name] = rng.choice([0, 1, 255])
        with pa.ipc.new_stream(str(tmp_path / "altered"), table.schema) as stream:
            stream.write_table(pa.Table.from_pylist(rows, schema=table.schema))
        try:
            trace = Trace(tmp_path / "altered")
        except BadTrace:
            continue
        for operation in trace.iter_operations():
            assert operation.kind in ("call", "fork", "exec", "exit", "fault", "other")


def test_an_empty_recording_is_refused(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "t", {}).close()
    with pytest.raises(BadTrace, match="no records"):
        Trace(tmp_path / "t")


def test_errno_names() -> None:
    assert errno_name(-12) == "ENOMEM"
    assert errno_name(0) is None
    assert errno_name(None) is None
    assert errno_name(0x7F0000001000) is None
    assert errno_name(-4000) == "4000"


def test_system_calls_of_each_abi() -> None:
    assert op_classes("x86_64")[0, 9] == "OP_MMAP"
    assert op_classes("arm64") == op_classes("aarch64")
    assert find_call("x86_64", 1, 192).arguments[-1] == "pgoff"  # type: ignore[union-attr]
    assert find_call("aarch64", 0, 220).arguments[3] == "tls"  # type: ignore[union-attr]
    assert call_name("x86_64", 0, 65535) == "fault"
    assert call_name("x86_64", 0, 999) == "syscall_999"
    assert not system_calls("sparc")
    assert set(op_classes("x86_64").values()) <= set(OP_CLASSES)
    assert KINDS["SECTION"] == 1
