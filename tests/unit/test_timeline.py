"""States at any moment, histories, differences, events - and how the commands show them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tracebuilder import PAGE, READ, WRITE, ToyKernel
from vmatrace.cli import main
from vmatrace.errors import UsageError
from vmatrace.ingest import Trace
from vmatrace.report.maps import render_snapshot
from vmatrace.timeline import EVENT_KINDS, Timeline, difference, iter_events, parse_moment, timelines


def toy_kernel() -> ToyKernel:
    kernel = ToyKernel()
    space = kernel.start((4, 8, READ))
    kernel.map(space, 20, 24, READ | WRITE)  # op 1
    kernel.touch(space, 22)
    kernel.protect(space, 21, 22, READ)  # op 2
    child = kernel.fork(space)  # op 3
    kernel.unmap(child, 20, 24)
    kernel.exit(child)
    kernel.map(space, 24, 26, READ | WRITE, join=True)  # op 4: grows the piece [22, 24)
    kernel.exit(space)  # op 5
    return kernel


@pytest.fixture
def kernel() -> ToyKernel:
    return toy_kernel()


@pytest.fixture
def path(kernel: ToyKernel, tmp_path: Path) -> Path:
    return kernel.write(tmp_path / "toy.vmat")


@pytest.fixture
def trace(path: Path) -> Trace:
    return Trace(path)


def pages(vmas: Any) -> list[tuple[int, int]]:
    return [(vma.start // PAGE, vma.end // PAGE) for vma in vmas]


def test_states_by_operation(trace: Trace) -> None:
    timeline = Timeline(trace, 1)
    assert pages(timeline.at_op(0).vmas) == [(4, 8)]
    assert pages(timeline.at_op(1).vmas) == [(4, 8), (20, 24)]
    assert pages(timeline.at_op(2).vmas) == [(4, 8), (20, 21), (21, 22), (22, 24)]
    assert pages(timeline.at_op(4).vmas) == pages(timeline.at_end().vmas)
    assert pages(timeline.at_end().vmas)[-1] == (22, 26)
    with pytest.raises(UsageError, match="no operation 99"):
        timeline.at_op(99)


def test_states_by_time(trace: Trace) -> None:
    timeline = Timeline(trace, 1)
    assert pages(timeline.at(0).vmas) == [(4, 8)]
    assert timeline.at(10**9).sections == timeline.at_end().sections
    with pytest.raises(UsageError, match="began"):
        Timeline(trace, 2).at(0)


def test_a_child_begins_with_its_parents_state(trace: Trace) -> None:
    child = Timeline(trace, 2)
    born = child.at_op(0)
    assert pages(born.vmas) == pages(Timeline(trace, 1).at_op(3).vmas)
    assert [vma.forked for vma in born.vmas] == [False, True, True, True]
    assert all(vma.anon_vma is not None and vma.anon_vma < 0 for vma in born.vmas if vma.forked)
    assert pages(child.at_op(1).vmas) == [(4, 8)]


def test_an_anon_vma_gained_between_two_looks(trace: Trace) -> None:
    timeline = Timeline(trace, 1)
    moment = timeline.at_op(1)
    # The fault came before the next look and after this operation: not there yet, and that is certain.
    assert [vma.anon_vma for vma in moment.vmas] == [None, None]
    assert moment.anon_vma_since == {}
    gained = int(trace.records.faults["time"][0]) - trace.records.first_time
    assert timeline.at(gained - 1).vmas[1].anon_vma is None
    assert timeline.at(gained).vmas[1].anon_vma is not None


def test_two_gains_between_two_looks_cannot_be_told_apart(tmp_path: Path) -> None:
    kernel = ToyKernel()
    space = kernel.start((4, 8, READ | WRITE), (10, 12, READ | WRITE))
    kernel.touch(space, 4)
    kernel.touch(space, 10)
    kernel.exit(space)
    trace = Trace(kernel.write(tmp_path / "t"))
    times = [int(time) for time in trace.records.faults["time"]]
    shot = Timeline(trace, 1).at(times[0] - trace.records.first_time)
    assert shot.anon_vma_since == {4 * PAGE: (times[0], times[1]), 10 * PAGE: (times[0], times[1])}


def test_history_tells_who_split_an_address(trace: Trace) -> None:
    history = Timeline(trace, 1).history(23 * PAGE)
    assert [(event.operation.name, [effect.kind for effect in event.effects]) for event in history] == [
        ("mmap", ["new"]),
        ("mprotect", ["split", "split"]),
        ("mmap", ["merge"]),
        ("exit", []),
    ]
    assert history[0].before is None
    assert pages([history[2].before, history[2].after]) == [(22, 24), (22, 26)]


def test_lifetimes(trace: Trace) -> None:
    lives = Timeline(trace, 1).lifetimes()
    assert [(life.birth, life.born, life.death, life.died) for life in lives] == [
        ("exec", 0, "exit", 5), ("new", 1, "exit", 5), ("split", 2, "exit", 5), ("split", 2, "exit", 5),
    ]  # fmt: skip
    assert lives[2].parent == lives[1].obj


def test_difference(trace: Trace) -> None:
    timeline = Timeline(trace, 1)
    found = difference(timeline.at_op(1), timeline.at_op(2))
    assert pages(found.added) == [(21, 22), (22, 24)]
    assert found.removed == ()
    assert [(pages([a]), pages([b])) for a, b in found.changed] == [([(20, 24)], [(20, 21)])]
    assert difference(timeline.at_op(2), timeline.at_op(2)) == difference(
        timeline.at_end(), timeline.at_end()
    )


def test_what_was_lost_is_unknown_until_it_is_read_again(kernel: ToyKernel, tmp_path: Path) -> None:
    at = next(i for i, (t, r) in enumerate(kernel.records) if t == "sections" and r["seq"] == 3)
    trace = Trace(kernel.write(tmp_path / "lossy", drop=lambda n: n == at))
    timeline = Timeline(trace, 1)
    assert timeline.at_op(1).unknown == ()
    after = timeline.at_op(3)
    assert after.unknown
    assert any(line.find("unknown") > 0 for line in render_snapshot(after, trace, 100))
    assert timeline.at_end().unknown == ()


def test_moments(trace: Trace) -> None:
    def read(text: str) -> Any:
        moment = parse_moment(text, trace)
        return moment.op if moment.op is not None else moment.time

    assert read("end") is None
    assert read("op:7") == 7
    assert read("250") == 250
    assert read("1.5s") == 1_500_000_000
    assert read("2ms") == 2_000_000
    first = trace.records.first_time
    assert read("2023-11-14T22:13:20.000005+00:00") == 5000 - first
    for wrong in ("soon", "1.5x", "", "-3", "2001-01-01T00:00:00"):
        with pytest.raises(UsageError):
            parse_moment(wrong, trace)


def test_timelines_of_processes(trace: Trace) -> None:
    assert [timeline.space.id for timeline in timelines(trace)] == [1]
    assert [timeline.space.id for timeline in timelines(trace, trace.spaces[2].pid)] == [2]
    with pytest.raises(UsageError, match="process 9 is not in the trace"):
        timelines(trace, 9)


def test_events_in_order(trace: Trace) -> None:
    kinds = [event["kind"] for event in iter_events(trace)]
    assert kinds == [
        "exec", "new", "anon_vma", "split", "split", "fork", "unmap", "unmap", "unmap", "exit", "merge",
        "exit",
    ]  # fmt: skip
    assert [event["kind"] for event in iter_events(trace, kinds=["merge", "split"])] == [
        "split",
        "split",
        "merge",
    ]
    assert [event["op"] for event in iter_events(trace, pid=trace.spaces[2].pid, kinds=["unmap"])] == [
        1,
        1,
        1,
    ]
    (merge,) = iter_events(trace, kinds=["merge"])
    assert (merge["side"], merge["start"], merge["end"]) == ("left", 22 * PAGE, 26 * PAGE)
    with pytest.raises(UsageError, match="marge"):
        list(iter_events(trace, kinds=["marge"]))


# ---- commands ----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_timeline_as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "timeline", path, "--at", "end", "--format", "json"))
    assert found["schema"] == 1
    assert (found["pid"], found["generation"], found["unknown"]) == (100, 1, [])
    assert found["vmas"][0] == found["vmas"][0] | {
        "start": 4 * PAGE,
        "end": 8 * PAGE,
        "flags": ["READ", "MAYREAD", "MAYWRITE", "MAYEXEC"],
        "pgoff": 4,
        "file": None,
        "anon_vma": None,
        "forked": False,
    }
    assert all(isinstance(vma["object"], int) and vma["object"] < 1 << 53 for vma in found["vmas"])


def test_timeline_of_several_processes(path: Path, trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for space in trace.spaces.values() for word in ("--pid", space.pid)]
    found = json.loads(run(capsys, "timeline", path, *words, "--format", "json"))
    assert [space["space"] for space in found["spaces"]] == [1, 2]


def test_timeline_as_text_looks_like_maps(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "timeline", path, "--op", "2").splitlines()
    assert lines[0].startswith("# PID 100 (toy), address space 1 (generation 1 of 1, by exec)")
    assert lines[1].startswith("00004000-00008000 r--p 00000000 00:00 0")
    assert "anon_vma=" in lines[2]


def test_timeline_as_csv(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(run(capsys, "timeline", path, "--format", "csv"))))
    assert [int(row["start"]) // PAGE for row in rows] == [4, 20, 21, 22]


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_timeline_difference(path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    out = run(capsys, "timeline", path, "--diff", "op:1", "op:2", "--format", form)
    if form == "json":
        found = json.loads(out)
        assert [len(found[name]) for name in ("added", "removed", "changed")] == [2, 0, 1]
    else:
        assert len(out.splitlines()) == 4 + (form == "csv")


@pytest.mark.parametrize(
    "words",
    [
        ("--pid", "9"),
        ("--at", "soon"),
        ("--op", "99"),
        ("--at", "1s", "--op", "2"),
        ("--generation", "7"),
    ],
)
def test_timeline_refuses_what_is_not_there(
    path: Path, capsys: pytest.CaptureFixture[str], words: Any
) -> None:
    assert main(["timeline", str(path), *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_commands_refuse_what_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "timeline"):
        assert main([command, str(tmp_path / "none")]) == 4
        assert "hint: " in capsys.readouterr().err


def test_an_incomplete_trace_opens_with_a_warning(kernel: ToyKernel, tmp_path: Path, capsys: Any) -> None:
    path = kernel.write(tmp_path / "cut", finish=False)
    assert main(["timeline", str(path), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["complete"] is False
    assert "warning: " in err


def test_show(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "show", path).splitlines()
    assert len(lines) == 12
    assert "mprotect(start=0x15000, len=0x1000, prot=1) = 0" in lines[3]
    assert len(run(capsys, "show", path, "--kind", "split", "--limit", "1").splitlines()) == 1
    found = json.loads(run(capsys, "show", path, "--format", "json", "--kind", "merge,exec"))
    assert [event["kind"] for event in found["events"]] == ["exec", "merge"]
    rows = list(csv.DictReader(io.StringIO(run(capsys, "show", path, "--format", "csv"))))
    assert {row["kind"] for row in rows} <= set(EVENT_KINDS)


def test_show_one_address(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "show", path, "--addr", hex(23 * PAGE), "--pid", "100").splitlines()
    assert [line.split()[3] for line in lines] == ["new", "split", "split", "merge", "exit"]
    assert main(["show", str(path), "--addr", "zzz"]) == 2
