"""A first look at a process that changes all the while, and states known again after losses."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.recorder import Recorder, holes, read_trace, wait_until
from tests.live.recording import PAGE, vmatrace_json
from tests.workloads.oracle import difference, from_timeline, read_maps
from vmatrace.schema import KINDS

# Threads cut, join, map and unmap in one address space, each in its own part, until told to stop: then all
# stand still, and "s" is written; a last byte ends the program. With an argument they make that many rounds.
STORM = """
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
enum { THREADS = 3, PAGES = 64 };
static volatile int stop;
static long rounds;
static pthread_barrier_t done;
static void *work(void *seed)
{
	unsigned long x = (unsigned long)seed * 7919 + 1;
	char *at = mmap(0, PAGES * 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (long i = 0; rounds ? i < rounds : !stop; i++) {
		x = x * 6364136223846793005UL + 1442695040888963407UL;
		unsigned long from = x >> 33 & 31, many = (x >> 40 & 15) + 1, what = x >> 50 & 7;
		char *where = at + from * 4096;
		if (what < 4)
			mprotect(where, many * 4096, what & 1 ? PROT_READ : PROT_READ | PROT_WRITE);
		else if (what == 4)
			munmap(where, many * 4096);
		else if (what < 7)
			mmap(where, many * 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		else
			madvise(where, many * 4096, x & 1 << 20 ? MADV_DONTFORK : MADV_DOFORK);
	}
	pthread_barrier_wait(&done);
	pause();
	return 0;
}
int main(int argc, char **argv)
{
	pthread_t thread;
	char c;
	rounds = argc > 1 ? atol(argv[1]) : 0;
	pthread_barrier_init(&done, 0, THREADS + 1);
	if (rounds)
		read(0, &c, 1);
	for (long i = 0; i < THREADS; i++)
		pthread_create(&thread, 0, work, (void *)i);
	if (!rounds) {
		write(1, "r", 1);
		read(0, &c, 1);
		stop = 1;
	}
	pthread_barrier_wait(&done);
	write(1, "s", 1);
	read(0, &c, 1);
	_exit(6);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storm")
    (folder / "storm.c").write_text(STORM)
    subprocess.run(["gcc", "-O1", "-w", "-pthread", "-o", folder / "thread_storm", folder / "storm.c"], check=True)
    return folder / "thread_storm"


class Target:
    """The storm as a child of the test."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def wait(self, byte: bytes) -> None:
        """Until it says so."""
        assert self.process.stdout
        said = self.process.stdout.read(1)
        assert said == byte, f"the program ended with {self.process.wait()}"

    def go(self) -> None:
        """Let it go on."""
        assert self.process.stdin
        self.process.stdin.write(b"g")


@pytest.fixture
def targets() -> Iterator[list[Target]]:
    made: list[Target] = []
    yield made
    for target in made:
        target.process.kill()
        target.process.communicate()


def assert_last_state(trace: Path, pid: int, dump: Path) -> None:
    answer = vmatrace_json("timeline", trace, "--at", "end", "--pid", str(pid), "--format", "json")
    due, got = read_maps(dump), from_timeline(answer["vmas"], PAGE)
    assert got == due, difference(due, got)


def copy_maps(pid: int, into: Path) -> Path:
    into.write_bytes(Path(f"/proc/{pid}/maps").read_bytes())
    return into


def last_look(trace: Path) -> int:
    """When the recorder last read the whole address space by itself, by the monotonic clock."""
    _, tables = read_trace(trace, "nr", "time")
    return max((row["time"] for row in tables.get("sections", []) if row["nr"] == 65535), default=0)


def test_the_first_look_at_a_storm_of_threads_is_exact(program: Path, targets: list[Target], tmp_path: Path) -> None:
    """What was seen first and each change since then lead to what the process is in the end."""
    target = Target(program)
    targets.append(target)
    pid = target.process.pid
    target.wait(b"r")
    with Recorder(tmp_path, "-p", str(pid), "--buffer", "64M") as recorder:
        recorder.wait_for("tracing")
        assert "changed all the while" not in recorder.said()
        target.go()
        target.wait(b"s")
        dump = copy_maps(pid, tmp_path / "maps")
        target.go()
        assert target.process.wait() == 6
        assert recorder.end() == 0
    file, tables = read_trace(recorder.path, "index", "nr", "seq", "space", "kind")
    assert file.complete
    sections = sorted(tables["sections"], key=lambda row: row["index"])
    first = [row["nr"] for row in sections].index(65535)
    assert len(sections) > first + 100, "it went on changing after the first look"
    assert sections[-1]["kind"] == KINDS["LAST"]
    assert holes(recorder.path) == file.end["lost"]
    assert_last_state(recorder.path, pid, dump)


def test_states_are_known_again_after_losses(program: Path, targets: list[Target], tmp_path: Path) -> None:
    """A ring that is too small on purpose; the process lives on, so nothing but our own looks can mend it."""
    target = Target(program, "8000")
    targets.append(target)
    pid = target.process.pid
    with Recorder(tmp_path, "-p", str(pid), "--buffer", "64K") as recorder:
        recorder.wait_for("tracing")
        target.go()
        target.wait(b"s")
        dump = copy_maps(pid, tmp_path / "maps")
        stopped = time.monotonic_ns()
        wait_until(lambda: last_look(recorder.path) > stopped, "not read again after the last losses")
        meanwhile = Path(shutil.copy(recorder.path, tmp_path / "meanwhile"))
        recorder.tell(signal.SIGINT)
        assert recorder.end() == 0
        assert "records were lost" in recorder.said()
    file, tables = read_trace(recorder.path, "index", "nr", "time", "lost")
    lost = file.end["lost"]
    assert lost > 100
    assert holes(recorder.path) == lost
    assert sum(row["lost"] for row in tables["losses"]) == lost
    assert [row["nr"] for row in tables["sections"]].count(65535) >= 3, "first, after losses, at the end"
    assert_last_state(meanwhile, pid, dump)
    assert_last_state(recorder.path, pid, dump)


def test_a_recording_that_is_stopped_amid_a_storm_cuts_no_operation_in_half(
    program: Path, targets: list[Target], tmp_path: Path
) -> None:
    """The hooks go one after the other: what they see meanwhile is none of the recording."""
    target = Target(program)
    targets.append(target)
    target.wait(b"r")
    with Recorder(tmp_path, "-p", str(target.process.pid), "--buffer", "64M", "--duration", "0.2") as recorder:
        assert recorder.end() == 0, recorder.said()
    assert holes(recorder.path) == 0
    sums = vmatrace_json("replay", recorder.path, "--format", "json")
    assert sums["failed"] == 0, sums["divergences"][:3]
    assert sums["passed"] > 100
