"""Recordings that go well: what is traced, what is left alone, and that both go on as if nobody looked."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.recorder import Recorder, holes, read_trace
from tests.live.recording import PAGE, vmatrace_json
from tests.workloads.build import build
from tests.workloads.oracle import Line, difference, from_timeline, read_maps
from vmatrace.schema import KINDS


def last_state(trace: Path, pid: int) -> list[Line]:
    return from_timeline(
        vmatrace_json("timeline", trace, "--at", "end", "--pid", str(pid), "--format", "json")["vmas"], PAGE
    )


def maps_of(pid: int, folder: Path) -> list[Line]:
    dump = folder / f"maps.{pid}"
    dump.write_bytes(Path(f"/proc/{pid}/maps").read_bytes())
    return read_maps(dump)


def test_the_command_notices_nothing(tmp_path: Path) -> None:
    """Its streams, its user, its place and its status are its own; the recorder speaks on stderr alone."""
    nobody = pwd.getpwnam("nobody")
    script = 'cat; echo "$(id -u):$(id -g):$HOME:$PWD"; test -t 0; echo $? >&2; exit 37'
    with Recorder(tmp_path, "-q", "-u", "nobody", "--", "sh", "-c", script, stdin=subprocess.PIPE, cwd="/") as recorder:
        recorder.output = recorder.process.communicate(b"in\0put\n", timeout=100)[0]
        assert recorder.process.returncode == 37
    due = f"in\0put\n{nobody.pw_uid}:{nobody.pw_gid}:{nobody.pw_dir}:/\n"
    assert recorder.output.decode() == due
    assert recorder.said() == "1\n", "quiet"


# A shell that does what is hard to follow, a line each; every step says its PIDs.
FAMILY = """
import os, subprocess, sys, threading, time

def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execvp("sleep", ["sleep", "301.5"])
        os._exit(0)
    os.wait()

def exec_in_a_thread():
    if os.fork() == 0:
        def run():
            os.execvp("sh", ["sh", "-c", "exit 21"])
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.wait()[1])

def leader_goes_first():
    if os.fork() == 0:
        import ctypes
        def run():
            time.sleep(0.1)
            os.execvp("sh", ["sh", "-c", "exit 22"])
        threading.Thread(target=run).start()
        ctypes.CDLL(None).syscall(60, 0)
    return os.waitstatus_to_exitcode(os.wait()[1])

daemon()
assert exec_in_a_thread() == 21
assert leader_goes_first() == 22
assert subprocess.run(["sh", "-c", "exit 23"], close_fds=False).returncode == 23
inner = "i=0; while [ $i -lt 1000 ]; do (:); i=$((i+1)); done; exit 24"
assert subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", inner]).returncode == 24
print(open("/proc/self/maps").read())
sys.stdout.flush()
os._exit(11)
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """A recording of a command with all kinds of descendants, one of which stays."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "family.py").write_text(FAMILY)
    with Recorder(folder, "--", sys.executable, "-I", folder / "family.py", name="family") as recorder:
        status = recorder.end()
        said = recorder.said()
    daemons = [
        int(word) for line in said.splitlines() if line.startswith("alive") for word in line.split() if word.isdigit()
    ]
    try:
        assert status == 11, said
        yield recorder
        for pid in daemons:
            assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00301.5\x00", "was harmed"
    finally:
        for pid in daemons:
            os.kill(pid, 9)


def test_every_descendant_is_followed_and_counted(family: Recorder) -> None:
    file, tables = read_trace(family.path, "kind", "pid", "tid", "space", "parent_space", "exit_code")
    assert file.complete
    assert file.end["lost"] == 0
    ends = Counter(
        task["exit_code"] >> 8
        for task in tables["tasks"]
        if task["kind"] == KINDS["TASK_EXIT"] and task["pid"] == task["tid"]
    )
    for status in (11, 21, 22, 23, 24):
        assert ends[status] >= 1, status
    forks = [
        task for task in tables["tasks"] if task["kind"] == KINDS["FORK"] and task["space"] != task["parent_space"]
    ]
    assert len(forks) >= 1000
    execs = {row["pid"] for row in tables["sections"] if row["kind"] == KINDS["EXEC"]}
    gone = {
        task["pid"]
        for task in tables["tasks"]
        if task["kind"] == KINDS["TASK_EXIT"] and task["exit_code"] >> 8 in (21, 22)
    }
    assert gone <= execs, "a thread other than the first executed a program"
    assert holes(family.path) == 0


def test_what_lives_on_is_told_with_its_state(family: Recorder, tmp_path: Path) -> None:
    file, tables = read_trace(family.path, "pid", "nr", "index")
    assert file.end["reason"] == "the command ended"
    assert len(file.end["alive"]) == 1
    pid = file.end["alive"][0]
    assert f"alive and left alone: PID {pid}" in family.said()
    assert [row["nr"] for row in tables["sections"] if row["pid"] == pid][-1] == 65535, "a last look"
    assert (got := last_state(family.path, pid)) == (due := maps_of(pid, tmp_path)), difference(due, got)


def test_a_program_ends_in_the_state_that_it_saw(family: Recorder, tmp_path: Path) -> None:
    """But for what the C library mapped while it was printed."""
    _, tables = read_trace(family.path, "pid", "index", "kind")
    first = min(tables["sections"], key=lambda row: row["index"])["pid"]
    dump = tmp_path / "dump"
    dump.write_bytes(family.output.strip() + b"\n")
    due, got = set(read_maps(dump)), set(last_state(family.path, first))
    assert len(due ^ got) <= 6, difference(sorted(due, key=str), sorted(got, key=str))


MANY = """
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	long many = atol(argv[1]);
	char c, *at = mmap(0, many * 4096UL, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (long i = 0; i < many; i += 2)
		mprotect(at + i * 4096, 4096, PROT_NONE);
	write(1, "r", 1);
	read(0, &c, 1);
	for (long i = 101; i < 200; i += 2)
		munmap(at + i * 4096, 4096);
	mlock(at + 4096 * 301, 4096 * 7);
	write(1, "d", 1);
	read(0, &c, 1);
	return 0;
}
"""


def test_several_processes_one_of_them_with_thousands_of_maps(tmp_path: Path) -> None:
    (tmp_path / "many.c").write_text(MANY)
    subprocess.run(["gcc", "-O1", "-w", "-o", tmp_path / "many", tmp_path / "many.c"], check=True)
    targets = [
        subprocess.Popen([tmp_path / "many", count], stdin=-1, stdout=-1, bufsize=0) for count in ("6000", "400")
    ]
    for target in targets:
        assert target.stdout
        assert target.stdout.read(1) == b"r"
    pids = [str(target.pid) for target in targets]
    with Recorder(tmp_path, "-p", pids[0], "-p", pids[1], "-p", pids[0]) as recorder:
        recorder.wait_for("tracing")
        due = {}
        for target in targets:
            assert target.stdin
            assert target.stdout
            target.stdin.write(b"g")
            assert target.stdout.read(1) == b"d"
            due[target.pid] = maps_of(target.pid, tmp_path)
        for target in targets:
            target.communicate(b"g")
            assert target.returncode == 0
        assert recorder.end() == 0, recorder.said()
    file, _ = read_trace(recorder.path)
    assert (file.complete, file.end["reason"]) == (True, "all traced processes ended")
    for target, least in zip(targets, (5_800, 200), strict=True):
        got = last_state(recorder.path, target.pid)
        assert len(got) > least
        assert got == due[target.pid], difference(due[target.pid], got)


def test_everything_but_the_recorder(tmp_path: Path) -> None:
    storm = build(["storm"])["storm"]
    with Recorder(tmp_path, "--all") as recorder:
        recorder.wait_for("tracing")
        target = subprocess.Popen([storm, "middle", "202"], stdout=subprocess.PIPE)
        assert b'"ops": 202' in target.communicate()[0]
        recorder.tell(signal.SIGINT)
        assert recorder.end() == 0
        me = recorder.process.pid
    file, tables = read_trace(recorder.path, "pid", "kind", "nr", "index", "comm")
    assert (file.complete, file.end["reason"]) == (True, "interrupted")
    assert file.end["lost"] == holes(recorder.path)
    pids = Counter(row["pid"] for row in tables["sections"])
    assert me not in pids
    assert pids[os.getpid()], "this test is there too"
    mprotects = [row for row in tables["sections"] if row["nr"] == 10 and row["pid"] == target.pid]
    assert 202 <= len(mprotects) <= 210, "the loader's too"


def test_a_recording_inside_a_pid_namespace(tmp_path: Path) -> None:
    before = ("unshare", "--pid", "--fork", "--mount-proc")
    inner = textwrap.dedent("""
        import os
        pid = os.fork()
        if pid == 0:
            os._exit(5)
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]) + (pid > 20000))
    """)
    with Recorder(tmp_path, "--", sys.executable, "-I", "-c", inner, before=before) as recorder:
        assert recorder.end() == 5
    file, tables = read_trace(recorder.path, "kind", "pid", "exit_code")
    assert file.complete
    ends = [task["exit_code"] >> 8 for task in tables["tasks"] if task["kind"] == KINDS["TASK_EXIT"]]
    assert ends == [5, 5]
