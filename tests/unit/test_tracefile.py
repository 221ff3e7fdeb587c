"""Trace files: what is written comes back; what is cut, damaged or foreign is told apart."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vmatrace.errors import BadTrace, CannotTrace, UsageError
from vmatrace.schema import CALL_FIELDS, SCHEMA_VERSION, TABLES
from vmatrace.tracefile import METADATA_KEY, Table, TraceFile, TraceWriter, arrow_schema

HEADER = {"kernel": {"release": "6.18.44", "arch": "x86_64", "page_size": 4096}}


def one_batch(first: int = 0) -> dict[str, dict[str, Any]]:
    vmas = {
        "start": np.array([0x1000, 0x3000, 0x1000], np.uint64),
        "end": np.array([0x2000, 0x4000, 0x4000], np.uint64),
        "name": ["", "[anon:ü]", ""],
    }
    return {
        "sections": {
            "index": np.array([first, first + 1], np.uint64),
            "space": [7, 7],
            "comm": ["", "cat"],
            "before": (np.array([0, 2, 3], np.int32), vmas),
        },
        "calls": {"index": [first + 2], "result": np.array([-12]), "arg0": np.array([2**64 - 1], np.uint64)},
    }


def written(path: Path, batches: int = 3, finish: bool = True) -> Path:
    with TraceWriter(path, HEADER) as writer:
        for number in range(batches):
            writer.write(one_batch(3 * number))
        if finish:
            writer.finish({"reason": "done", "records": 3 * batches, "lost": 0, "cpu_seq": [5, 6], "alive": []})
    return path


def test_round_trip(tmp_path: Path) -> None:
    trace = TraceFile(written(tmp_path / "t.vmat"))
    batches = list(trace.batches())
    assert trace.complete
    assert trace.warning == ""
    assert trace.header == {**HEADER, "schema": SCHEMA_VERSION}
    assert trace.end["reason"] == "done"
    assert trace.end["cpu_seq"] == [5, 6]
    assert len(batches) == 4
    sections, calls = batches[1]["sections"], batches[1]["calls"]
    assert sections["index"].tolist() == [3, 4]
    assert sections.text("comm") == ["", "cat"]
    assert sections.offsets("before").tolist() == [0, 2, 3]
    assert sections.child("before")["end"].tolist() == [0x2000, 0x4000, 0x4000]
    assert sections.child("before").text("name")[1] == "[anon:ü]"
    assert sections.child("before").has_text("name")
    assert sections.child("evidence").rows == 0
    assert calls["result"].tolist() == [-12]
    assert calls["arg0"].tolist() == [2**64 - 1]


def test_every_field_says_its_role() -> None:
    schema = arrow_schema({})
    struct = schema.field("calls").type.value_type
    assert struct.num_fields == len(CALL_FIELDS)
    assert struct.field("result").metadata[b"role"] == b"predicted"
    assert struct.field("arg0").metadata[b"doc"]
    assert set(schema.names) == {*TABLES, "end"} - {"decisions", "stacks", "call_stacks"}
    assert set(arrow_schema({"layers": ["operations", "decisions", "stacks"]}).names) == {*TABLES, "end"}


def test_a_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer, pytest.raises(ValueError, match="nonsense"):
        writer.write({"calls": {"nonsense": [1]}})


def test_created_for_the_owner_and_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "t.vmat")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists"):
        TraceWriter(path, HEADER)
    TraceWriter(path, HEADER, force=True).close()
    with pytest.raises(UsageError, match="no such directory"):
        TraceWriter(tmp_path / "no" / "t", HEADER)
    with pytest.raises(UsageError, match=str(tmp_path)):
        TraceWriter(tmp_path, HEADER, force=True)


def test_force_replaces_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "t.vmat"
    target.write_text("keep")
    link.symlink_to(target)
    TraceWriter(link, HEADER, force=True).close()
    assert target.read_text() == "keep"
    assert not link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_belongs_to_the_user_behind_sudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1234")
    monkeypatch.setenv("SUDO_GID", "2345")
    status = written(tmp_path / "t.vmat").stat()
    assert (status.st_uid, status.st_gid) == (1234, 2345)


def test_without_an_end_mark_it_is_incomplete(tmp_path: Path) -> None:
    trace = TraceFile(written(tmp_path / "t.vmat", finish=False))
    assert len(list(trace.batches())) == 3
    assert not trace.complete
    assert "3 complete batches" in trace.warning


def test_cut_at_any_byte(tmp_path: Path) -> None:
    data = written(tmp_path / "t.vmat", batches=2).read_bytes()
    header = pa.ipc.MessageReader.open_stream(pa.py_buffer(data)).read_next_message()
    whole = TraceFile(tmp_path / "t.vmat")
    assert len(list(whole.batches())) == 3
    cut, counts = tmp_path / "cut", set()
    for length in [
        *range(0, header.metadata.size, 997),
        *range(header.metadata.size - 20, len(data), 197),
        len(data) - 1,
    ]:
        cut.write_bytes(data[:length])
        try:
            trace = TraceFile(cut)
        except BadTrace:
            assert length < header.metadata.size + 8 + 64
            continue
        counts.add(len(list(trace.batches())))
        assert trace.warning
        assert not trace.complete
    assert counts == {0, 1, 2, 3}


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    data = written(tmp_path / "t.vmat", batches=2).read_bytes()
    rng, bad = random.Random(1), tmp_path / "bad"
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        bad.write_bytes(broken)
        try:
            trace = TraceFile(bad)
            for batch in trace.batches():
                for name in TABLES:
                    for field in TABLES[name]:
                        if field.type[0] in "ui":
                            batch[name][field.name].sum()
                batch["sections"].child("before").text("name")
        except BadTrace:
            continue


def other_arrow(path: Path) -> None:
    table = pa.table({"a": [1, 2]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b""), "not a vmatrace trace"),
        (lambda path: path.mkdir(), "a directory"),
        (lambda path: path.symlink_to("/dev/null"), "no regular file"),
        (lambda path: path.write_bytes(b"garbage" * 100), "not a vmatrace trace"),
        (
            lambda path: path.write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100)),
            "not a vmatrace trace",
        ),
        (other_arrow, "something else"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_not_a_trace_is_refused(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(BadTrace, match=says) as caught:
        TraceFile(tmp_path / "x")
    assert caught.value.hint


def with_header(path: Path, header: bytes) -> Path:
    schema = arrow_schema({}).with_metadata({METADATA_KEY: header})
    pa.ipc.new_stream(str(path), schema).close()
    return path


def test_a_newer_schema_names_both_versions(tmp_path: Path) -> None:
    path = with_header(tmp_path / "x", json.dumps({"schema": 99}).encode())
    with pytest.raises(BadTrace, match=f"schema 99.*knows schema {SCHEMA_VERSION}") as caught:
        TraceFile(path)
    assert "newer vmatrace" in caught.value.hint


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b'{"schema": "1"}', b"\xff", b"[" * 100_000])
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(BadTrace, match="header is damaged"):
        TraceFile(with_header(tmp_path / "x", header))


def test_a_trace_rewritten_with_pyarrow_stays_a_trace(tmp_path: Path) -> None:
    with pa.ipc.open_stream(str(written(tmp_path / "t.vmat"))) as stream:
        table = stream.read_all()
    rows = table.to_pylist()
    rows[1]["calls"][0]["result"] = -22
    altered = pa.Table.from_pylist(rows, schema=table.schema)
    with pa.ipc.new_stream(str(tmp_path / "altered"), table.schema) as stream:
        stream.write_table(altered)
    trace = TraceFile(tmp_path / "altered")
    (batch,) = list(trace.batches())
    assert trace.complete
    assert batch["calls"]["result"].tolist() == [-12, -22, -12]
    assert batch["sections"].offsets("before").tolist() == [0, 2, 3, 5, 6, 8, 9]


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "t.vmat", os.writev
    writer = TraceWriter(path, HEADER)
    writer.write(one_batch())

    def full(fd: int, parts: Any) -> int:
        real(fd, [bytes(parts[0])[:10]])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(CannotTrace, match="No space left") as caught:
        writer.write(one_batch())
    assert "free some space" in caught.value.hint
    with pytest.raises(CannotTrace, match="closed"):
        writer.write(one_batch())
    assert path.stat().st_size == writer.bytes_written
    assert len(list(TraceFile(path).batches())) == 1


def test_devices_are_written_as_they_are() -> None:
    with TraceWriter("/dev/null", HEADER) as writer:
        writer.write(one_batch())
        assert writer.bytes_written
    with pytest.raises(CannotTrace, match="No space left"):
        TraceWriter("/dev/full", HEADER)


def test_a_list_of_no_rows_may_point_anywhere() -> None:
    """Arrow's own flatten ends the process on this."""
    child = pa.array([], pa.uint32())
    offsets = pa.py_buffer(np.array([34], np.int32))
    empty = pa.Array.from_buffers(pa.list_(pa.uint32()), 0, [None, offsets], children=[child])
    struct = pa.StructArray.from_arrays([empty], ["numbers"])
    table = Table(struct)
    assert table.offsets("numbers").tolist() == [0]
    assert table.numbers("numbers").tolist() == []
