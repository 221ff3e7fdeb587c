"""`record --stacks`: who made each call, by the names of a program's functions."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.live.recording import VMATRACE, Recorded, assert_conforms, record, vmatrace_json
from tests.workloads.build import build

ARENAS = 7


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    program = build(["stacks"])["stacks"]
    found = record(tmp_path_factory.mktemp("stacks") / "t.vmat", program, options=["--stacks"])
    assert found.status == 0, found.stderr
    return found


def names(event: dict[str, object]) -> list[str]:
    frames = event["stack"]
    assert isinstance(frames, list)
    return [(frame["symbol"] or "").split("+")[0] for frame in frames]


def test_each_call_names_its_callers(recorded: Recorded) -> None:
    events = vmatrace_json("show", recorded.path, "--kind", "call", "--format", "json")["events"]
    guards = [event for event in events if event["syscall"] == "mprotect" and "guard_page" in names(event)]
    assert [names(event)[1:4] for event in guards] == [["guard_page", "make_arena", "main"]] * ARENAS
    assert all(names(event)[0].endswith("mprotect") for event in guards)
    maps = [event for event in events if event["syscall"] == "mmap" and "make_arena" in names(event)]
    assert [names(event)[1:3] for event in maps] == [["make_arena", "main"]] * ARENAS
    # Without symbols, or without frame pointers, there is a file and an offset all the same.
    others = [event for event in events if event["op"] and event["syscall"] != "execve"]
    assert all(event["stack"] and event["stack"][0]["file"] for event in others)


def test_the_events_show_them_once_an_operation(recorded: Recorded) -> None:
    done = subprocess.run(
        [VMATRACE, "show", recorded.path, "--kind", "split"], capture_output=True, text=True, timeout=60, check=True
    )
    pattern = r"in mprotect\(.*\n +\w*mprotect\+0x\w+ \(.*\n +guard_page\+0x\w+ \(/.*/stacks\)\n +make_arena"
    assert len(re.findall(pattern, done.stdout)) >= ARENAS
    operations = len(set(re.findall(r"#\d+ ", done.stdout)))
    assert done.stdout.count("guard_page+") == ARENAS <= operations


def test_the_trace_is_a_trace(recorded: Recorded) -> None:
    assert stat.S_IMODE(recorded.path.stat().st_mode) == 0o600
    answer = recorded.replay()
    assert_conforms(answer)
    assert answer["trace"]["layers"][0] == "operations"
    # User addresses alone: not one of the kernel's half.
    shown = json.dumps(vmatrace_json("show", recorded.path, "--kind", "call", "--format", "json"))
    assert max(map(int, re.findall(r'"address": (\d+)', shown))) < 1 << 47


def test_without_the_option_there_are_none(tmp_path: Path) -> None:
    plain = record(tmp_path / "t.vmat", build(["stacks"])["stacks"])
    events = vmatrace_json("show", plain.path, "--format", "json")["events"]
    assert events
    assert not any("stack" in event for event in events)
