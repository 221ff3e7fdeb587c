"""The Python interface on a committed trace: what it says is consistent, and typed as documented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import vmatrace
from vmatrace import frames

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo.vmat"
DECIDED = DEMO.parent / "decisions" / "x86_64-6.18.vmat"


@pytest.fixture(scope="module")
def trace() -> Iterator[vmatrace.Trace]:
    with vmatrace.open(DEMO) as opened:
        yield opened


def test_info_tells_what_was_recorded(trace: vmatrace.Trace) -> None:
    info = trace.info
    assert info.command[0].endswith("demo")
    assert (info.arch, info.page_size, info.layers) == ("x86_64", 4096, ("operations",))
    assert info.complete
    assert not info.warning
    assert info.lost_records == 0
    assert info.operations == len(list(trace.operations())) > 50
    assert len(info.pids) == 2


def test_operations_of_one_process(trace: vmatrace.Trace) -> None:
    by_pid = [len(list(trace.operations(pid))) for pid in trace.info.pids]
    assert sum(by_pid) == trace.info.operations
    assert all(by_pid)


@pytest.mark.parametrize("kind", frames.COLUMNS)
def test_columns_are_as_documented(kind: str) -> None:
    frame = vmatrace.open(DECIDED if kind == "decisions" else DEMO).frame(kind)
    assert len(frame)
    assert list(frame.columns) == [name for name, _, _ in frames.COLUMNS[kind]]
    for name, dtype, meaning in frames.COLUMNS[kind]:
        assert frame[name].dtype == pd.api.types.pandas_dtype(dtype), name
        assert meaning
        if name in ("start", "end", "address", "obj", "anon_vma"):
            assert frame[name].dtype.name.lower() == "uint64"


def test_operations_frame_says_what_operations_say(trace: vmatrace.Trace) -> None:
    frame = trace.frame("operations")
    for row, operation in zip(frame.itertuples(), trace.operations(), strict=True):
        assert (row.space, row.op, row.pid, row.tid) == (
            operation.space, operation.n, operation.pid, operation.tid,
        )  # fmt: skip
        assert (row.syscall, row.kind, row.changed) == (operation.name, operation.kind, operation.changed)
        assert row.time == operation.time - trace.data.records.first_time
        assert row.result == operation.result or (row.result is pd.NA and operation.result is None)
        assert {name: getattr(row, name) for name in frames.EFFECTS} == {
            name: operation.effects[name] for name in frames.EFFECTS
        }


def test_events_are_the_effects_of_the_operations(trace: vmatrace.Trace) -> None:
    operations, events = trace.frame("operations"), trace.frame("events")
    calls = operations[operations.kind == "call"]
    counted = events.groupby("event").size()
    for name in ("merge", "split", "unmap", "copy"):
        assert counted.get(name, 0) == calls[name].sum()


def test_vmas_over_time_are_the_timeline_at_any_time(trace: vmatrace.Trace) -> None:
    vmas = trace.frame("vmas")
    for timeline in trace.timelines():
        mine = vmas[vmas.space == timeline.space.id]
        assert (mine.since < mine.until).all()
        for moment in sorted({*mine.since[mine.since > 0]})[::5]:
            snapshot = timeline.at(int(moment))
            now = mine[(mine.since <= moment) & (moment < mine.until)]
            rows = sorted(now[["start", "end", "flags", "pgoff"]].itertuples(index=False, name=None))
            same = frames.snapshot_frame(trace.data, snapshot)
            expected = same[["start", "end", "flags", "pgoff"]].itertuples(index=False, name=None)
            assert rows == sorted(expected), moment


def test_verdicts_are_those_of_the_replay(trace: vmatrace.Trace) -> None:
    counts = trace.frame("verdicts").groupby("verdict").size()
    result = trace.replay(rules="auto")
    assert not result.failed
    assert counts["passed"] == result.count("passed") > 50


def test_a_rule_switched_off_makes_it_fail(trace: vmatrace.Trace) -> None:
    assert trace.replay(without=["flags_equal"]).failed


def test_unknown_process_and_frame_are_usage_errors(trace: vmatrace.Trace) -> None:
    with pytest.raises(vmatrace.UsageError):
        trace.timeline(pid=4_000_000)
    with pytest.raises(vmatrace.UsageError) as caught:
        trace.frame("operation")
    assert "operations" in caught.value.hint


def test_what_is_no_trace_is_said(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no trace at all")
    with pytest.raises(vmatrace.BadTrace):
        vmatrace.open(tmp_path / "x")


def test_objects_show_themselves(trace: vmatrace.Trace) -> None:
    assert "complete" in repr(trace)
    html = trace._repr_html_()
    assert "Linux 6." in html
    assert "<script" not in html


def test_public_names_exist_and_nothing_else() -> None:
    for name in vmatrace.__all__:
        assert getattr(vmatrace, name).__doc__
    assert set(vmatrace.__all__) <= set(dir(vmatrace))
    with pytest.raises(AttributeError):
        vmatrace.nonsense  # noqa: B018
