"""Programs that are hard on a recorder: deaths, privileges, hostile names, 32 bits, the count's limit."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.live.recording import VMATRACE, Recorded, assert_conforms, assert_layout, record, vmatrace_json
from tests.workloads.build import build


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return build()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
def test_a_death_by_signal_passes_through(number: signal.Signals, programs: dict[str, Path], tmp_path: Path) -> None:
    dump = tmp_path / "maps"
    recorded = record(tmp_path / "t.vmat", programs["signal_death"], str(int(number)), "-o", dump)
    assert recorded.status == 128 + number, recorded.stderr
    assert_layout(recorded, dump)
    assert_conforms(recorded.replay())


def test_a_32_bit_program_is_seen_whole(programs: dict[str, Path], tmp_path: Path) -> None:
    if "compat32" not in programs:
        pytest.skip("gcc cannot make 32-bit programs here")
    dump = tmp_path / "maps"
    start = record(tmp_path / "base.vmat", programs["compat32"], "--baseline")
    recorded = record(tmp_path / "t.vmat", programs["compat32"], dump)
    assert (start.status, recorded.status) == (32, 32), recorded.stderr
    assert_layout(recorded, dump)
    answer, base = recorded.replay(), start.replay()
    assert_conforms(answer)
    counted = {
        name: answer["effects"].get(name, 0) - base["effects"].get(name, 0)
        for name in ("new", "split", "unmap", "merge")
    }
    assert counted == {"new": 4, "split": 1010, "unmap": 102, "merge": 0}


def test_hostile_names_stay_in_their_line(programs: dict[str, Path], tmp_path: Path) -> None:
    dump, files = tmp_path / "maps", tmp_path / "files"
    files.mkdir()
    recorded = record(tmp_path / "t.vmat", programs["hostile_name"], "-d", files, "-o", dump)
    assert recorded.status == 0, recorded.stderr
    assert_layout(recorded, dump)
    for words in (["show"], ["timeline", "--at", "end"], ["replay"]):
        done = subprocess.run(
            [VMATRACE, words[0], recorded.path, *words[1:]], capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert b"\033" not in done.stdout + done.stderr
        assert b"\n7f0000000000-7f0000001000" not in done.stdout
    answer = vmatrace_json("timeline", recorded.path, "--at", "end", "--format", "json")
    paths = [vma["file"]["path"] or "" for vma in answer["vmas"] if vma["file"]]
    assert any(path.endswith("new\\012line") for path in paths), paths
    # As /proc escapes it: newlines; other control characters are for JSON to escape.
    assert not any("\n" in path for path in paths)


def test_what_each_call_answers_at_the_limit_is_predicted(programs: dict[str, Path], tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 100_000:
        pytest.skip(f"vm.max_map_count is {limit}: filling it up takes too long")
    dump = tmp_path / "maps"
    recorded = record(tmp_path / "t.vmat", programs["maxmap"], "-o", dump)
    assert recorded.status == 0, recorded.stderr
    found = json.loads(recorded.stdout)
    assert found["vmas"] == found["limit"] == limit
    assert_layout(recorded, dump)
    assert_conforms(recorded.replay())


def test_a_set_uid_program_is_traced_and_keeps_its_privilege(
    programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        pytest.skip("no user `nobody` to start as")
    folder = tmp_path_factory.mktemp("setuid")
    for part in (folder, *folder.parents[:3]):
        part.chmod(part.stat().st_mode | 0o711)
    target, starter = folder / "target", folder / "starter"
    for copy in (target, starter):
        shutil.copy(programs["setuid_exec"], copy)
        copy.chmod(0o755)
    target.chmod(0o4755)
    if os.statvfs(folder).f_flag & os.ST_NOSUID:
        pytest.skip(f"{folder}: mounted nosuid")
    recorded = record(tmp_path / "t.vmat", starter, target, options=["-u", "nobody"])
    assert recorded.status == 0, recorded.stderr
    assert recorded.stdout.split() == [str(nobody.pw_uid), "0"]
    assert_conforms(recorded.replay())


def test_a_running_process_is_joined_in_the_middle(programs: dict[str, Path], tmp_path: Path) -> None:
    storm = subprocess.Popen(
        [programs["storm"], "middle", "3002", "--rounds", "3", "--wait-for-go"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert storm.stdin is not None
    assert storm.stdout is not None
    storm.stdout.readline()
    storm.stdin.write(b"g")
    storm.stdout.readline(), storm.stdout.readline()
    errors = tmp_path / "errors"
    with errors.open("wb") as stream:
        recorder = subprocess.Popen(
            [VMATRACE, "record", "-o", tmp_path / "t.vmat", "-p", str(storm.pid)], stderr=stream
        )
    deadline = time.monotonic() + 30
    while b"tracing" not in errors.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    storm.stdin.write(b"g")
    storm.stdout.readline(), storm.stdout.readline()
    dump = tmp_path / "maps"
    # Waiting for its third go: nothing changes while it is read.
    dump.write_bytes(Path(f"/proc/{storm.pid}/maps").read_bytes())
    storm.stdin.close()
    storm.wait(timeout=30)
    assert recorder.wait(timeout=30) == 0, errors.read_text()
    answer = vmatrace_json("replay", tmp_path / "t.vmat", "--format", "json", statuses=(0, 1))
    assert_conforms(answer)
    assert answer["effects"]["split"] == 3002
    assert answer["effects"]["merge"] == 1501
    assert_layout(Recorded(tmp_path / "t.vmat", 0, "", ""), dump, pid=storm.pid)
