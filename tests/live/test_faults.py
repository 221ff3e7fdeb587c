"""What goes wrong around a recording: one clear error, the right status, nothing lost, nothing left."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.btf_blob import BtfBlob
from tests.live.recorder import VMATRACE, Recorder, assert_programs_gone, read_trace, wait_until
from tests.workloads.build import build
from vmatrace import cli

NOBODY = 65534


@pytest.fixture(scope="module")
def storm() -> Path:
    return build(["storm"])["storm"]


def assert_clear(stdout: str, stderr: str) -> str:
    """One error, one hint and nothing else; gives the error."""
    lines = stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], stderr
    assert stdout == ""
    return lines[0]


def refused_behind(before: tuple[str, ...], *words: str | Path) -> tuple[int, str]:
    """Status and error of a recording that must not start, run by ``before``."""
    command = [*before, VMATRACE, "record", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    return done.returncode, assert_clear(done.stdout, done.stderr)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Status and error of a recording that must not start, in this very process."""

    def refuse(*words: str | Path) -> tuple[int, str]:
        status = cli.main(["record", *map(str, words)])
        said = capfd.readouterr()
        return status, assert_clear(said.out, said.err)

    return refuse


# ---- nothing can be traced here ----------------------------------------------------------------------------

NOT_ROOT = """
import os, sys
import vmatrace.capture.session, vmatrace.cli, vmatrace.cli.record
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
sys.exit(vmatrace.cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("words", "status"), [(["-p", "1"], 3), (["--", "true"], 125)])
def test_not_root(words: list[str], status: int, tmp_path: Path) -> None:
    """The privilege is dropped by the interpreter itself: another user need not see our files."""
    command = [sys.executable, "-c", NOT_ROOT, "record", "-o", tmp_path / "t", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stderr == "error: recording: needs root\nhint: run it with sudo\n"


def test_root_without_capabilities(tmp_path: Path) -> None:
    before = ("setpriv", "--bounding-set", "-sys_admin,-bpf,-perfmon")
    status, error = refused_behind(before, "-o", tmp_path / "t", "-p", "1")
    assert (status, "CAP_BPF" in error) == (3, True)


@pytest.mark.parametrize(
    ("hide", "error"),
    [
        ("mount -t tmpfs none /sys/kernel/btf", "this kernel offers none"),
        ("mount --bind /dev/null /sys/kernel/btf/vmlinux", "empty"),
        ('mount --bind "$0" /sys/kernel/btf/vmlinux', "maple tree"),
    ],
    ids=["no BTF", "an empty one", "a kernel too old for maple trees"],
)
def test_a_kernel_that_does_not_tell(hide: str, error: str, tmp_path: Path) -> None:
    old = BtfBlob()
    old.struct("mm_struct", 16, [("mmap", old.ulong, 0), ("mm_rb", old.ulong, 64)])
    (tmp_path / "btf").write_bytes(old.blob())
    before = ("unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', str(tmp_path / "btf"))
    status, said = refused_behind(before, "-o", tmp_path / "t", "-p", "1")
    assert status == 3
    assert error in said
    assert not (tmp_path / "t").exists()


def test_a_pid_namespace_has_other_pids(tmp_path: Path) -> None:
    before = ("unshare", "--pid", "--fork", "--mount-proc")
    for words in (["-p", "1"], ["--all"]):
        status, error = refused_behind(before, "-o", tmp_path / "t", *words)
        assert (status, "PID namespace" in error) == (3, True)


# ---- nothing can be traced as asked ------------------------------------------------------------------------


Refused = Callable[..., tuple[int, str]]


def test_what_cannot_be_followed_is_refused_at_once(refused: Refused, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    kernel_thread = next(entry.name for entry in entries if not (entry / "cmdline").read_bytes())
    for pid, why in (
        (gone.pid, "no such process"),
        (kernel_thread, "kernel thread"),
        (999_999_999, "no such process"),
        (0, "no such process"),
        (os.getpid(), "recorder itself"),
    ):
        status, error = refused("-o", tmp_path / "t", "-p", str(os.getppid()), "-p", str(pid))
        assert (status, why in error) == (2, True), error
    assert not (tmp_path / "t").exists()


def test_what_cannot_be_written_is_refused_at_once(refused: Refused, tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("precious")
    link.symlink_to(there)
    for place, why in (
        (tmp_path / "none" / "t", "no such directory"),
        (tmp_path, "directory"),
        (there, "exists already"),
        (link, "exists already"),
        (there / "t", "no such directory"),
    ):
        status, error = refused("-o", place, "--", "true")
        assert (status, why in error) == (2, True), error
    assert there.read_text() == "precious"


def test_commands_that_do_not_start(refused: Refused, tmp_path: Path) -> None:
    plain, trace = tmp_path / "plain", tmp_path / "t"
    plain.touch()
    for command, due in (("no-such-command", 127), (plain / "x", 127), (plain, 126), (tmp_path, 126)):
        assert refused("-o", trace, "--", command)[0] == due
    trace.write_text("an older trace")
    assert refused("--force", "-o", trace, "--", "no-such-command")[0] == 127
    assert trace.read_text() == "an older trace", "found out before the file was touched"


def test_a_command_that_only_the_kernel_refuses(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert refused_behind((), "-o", tmp_path / "new", "--", script)[0] == 127
    assert not (tmp_path / "new").exists(), "nothing was recorded"


def test_values_that_make_no_sense(refused: Refused, tmp_path: Path) -> None:
    for words in (
        ["--max-size", "frog"],
        ["--buffer", "100K"],
        ["--buffer", "1K"],
        ["--duration", "-1"],
        ["--duration", "nan"],
        ["-u", "no-such-user"],
        ["--layer", "none"],
    ):
        assert refused("-o", tmp_path / "t", *words, "--", "true")[0] == 2
    for words in ([], ["-p", "1", "--", "true"], ["--all", "--", "true"], ["-u", "nobody", "-p", "1"]):
        assert refused("-o", tmp_path / "t", *words)[0] == 2


# ---- the trace cannot be kept ------------------------------------------------------------------------------

SMALL_DISK = 'mount -t tmpfs -o size=1m none "$0" && "$@"; status=$?; cp "$0"/t* "$0.saved"; exit $status'
NO_RESERVE = """
import sys
import vmatrace.capture.sink, vmatrace.cli
vmatrace.capture.sink.FREE_RESERVE = -(1 << 40)
sys.exit(vmatrace.cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("reserve", [True, False], ids=["with a reserve", "to the last byte"])
def test_a_full_disk(reserve: bool, storm: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    recorder = [str(VMATRACE)] if reserve else [sys.executable, "-c", NO_RESERVE]
    command = [*recorder, "record", "-o", disk / "t", "--", storm, "pair", "20000"]
    before = ["unshare", "--mount", "sh", "-c", SMALL_DISK, disk]
    done = subprocess.run([*before, *command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert '"ops": 20000' in done.stdout, "the command is not told"
    assert "warning: " in done.stderr
    assert "disk is nearly full" in done.stderr if reserve else "No space left" in done.stderr
    file, tables = read_trace(Path(f"{disk}.saved"))
    assert file.complete is reserve
    assert len(tables["calls"]) > (1000 if reserve else 0), "each batch that fitted whole"
    assert os.path.getsize(f"{disk}.saved") < 1 << 20
    if reserve:
        assert file.end["reason"] == "the disk is nearly full"
    else:
        assert file.warning
        answer = subprocess.run([VMATRACE, "show", f"{disk}.saved"], capture_output=True, text=True, timeout=60)
        assert "warning" in answer.stderr, "it is said to be incomplete"


def test_a_size_that_is_held(storm: Path, tmp_path: Path) -> None:
    with Recorder(tmp_path, "--max-size", "1M", "--", storm, "mprotect", "40000") as recorder:
        assert recorder.end() == 0
        assert b'"ops": 40000' in recorder.output
        assert "--max-size" in recorder.said()
    size = recorder.path.stat().st_size
    assert 800_000 < size <= 1 << 20
    file, tables = read_trace(recorder.path)
    assert file.complete
    assert file.end["reason"] == "the trace reached --max-size"
    assert len(tables["sections"]) > 1000


def test_a_killed_recorder(storm: Path, tmp_path: Path) -> None:
    target = subprocess.Popen(
        [storm, "mix", "1", "--rounds", "2", "--wait-for-go"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert target.stdin is not None
    assert target.stdout is not None
    with Recorder(tmp_path, "-p", str(target.pid)) as recorder:
        recorder.wait_for("tracing")
        programs = recorder.programs()
        target.stdin.write(b"g")
        wait_until(lambda: len(read_trace(recorder.path)[1]["sections"]) > 1000, "nothing was flushed")
        recorder.tell(signal.SIGKILL)
        assert recorder.end() == -signal.SIGKILL
    assert_programs_gone(programs)
    target.stdin.write(b"g")
    assert target.communicate()[0].count(b'"what": "mix"') == 2
    assert target.returncode == 0, "the target is unharmed"
    file, tables = read_trace(recorder.path)
    assert (file.complete, bool(file.warning)) == (False, True)
    assert len(tables["sections"]) > 1000


# ---- signals -----------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal."""
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def on_terminal(slave: int) -> dict[str, object]:
    """How a process is started in the terminal's foreground."""

    def take() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    return {"stdin": slave, "preexec_fn": take}


def test_the_first_interrupt_is_the_commands(terminal: tuple[int, int], tmp_path: Path) -> None:
    master, slave = terminal
    script = 'trap "echo told" INT; echo ready; while :; do read x || true; test "$x" && exit 9; done'
    with Recorder(tmp_path, "--", "sh", "-c", script, **on_terminal(slave)) as recorder:
        recorder.wait_for("tracing")
        assert recorder.process.stdout is not None
        assert recorder.process.stdout.readline() == b"ready\n"
        os.write(master, b"\x03")
        recorder.wait_for("waiting for the command")
        assert recorder.process.stdout.readline() == b"told\n"
        os.write(master, b"go\n")
        assert recorder.end() == 9
    file, _ = read_trace(recorder.path)
    assert (file.complete, file.end["reason"]) == (True, "the command ended")


def test_the_second_interrupt_detaches(terminal: tuple[int, int], tmp_path: Path) -> None:
    master, slave = terminal
    script = 'trap "" INT; echo $$; exec sleep 300'
    with Recorder(tmp_path, "--", "sh", "-c", script, **on_terminal(slave)) as recorder:
        recorder.wait_for("tracing")
        programs = recorder.programs()
        assert recorder.process.stdout is not None
        command = int(recorder.process.stdout.readline())
        os.write(master, b"\x03")
        recorder.wait_for("waiting for the command")
        os.write(master, b"\x03")
        recorder.process.stdout.close()
        recorder.process.stdout = None
        assert recorder.process.wait(timeout=60) == 130
    os.kill(command, signal.SIGKILL)
    assert_programs_gone(programs)
    file, tables = read_trace(recorder.path, "index", "nr")
    assert (file.complete, file.end["reason"]) == (True, "interrupted")
    assert len(file.end["alive"]) == 1
    last = max(tables["sections"], key=lambda row: row["index"])
    assert last["nr"] == 65535, "the state at the end"


def test_a_recording_of_what_runs_ends_by_signal(sleeper: int, tmp_path: Path) -> None:
    """Ctrl-C is how it is ended; three recorders at once."""
    signals = {signal.SIGINT: 0, signal.SIGTERM: 143, signal.SIGHUP: 129}
    recorders = {number: Recorder(tmp_path, "-p", str(sleeper), name=f"t{int(number)}") for number in signals}
    with recorders[signal.SIGINT], recorders[signal.SIGTERM], recorders[signal.SIGHUP]:
        for number, recorder in recorders.items():
            recorder.wait_for("tracing")
            programs = recorder.programs()
            recorder.tell(number)
            assert recorder.end() == signals[number]
            assert_programs_gone(programs)
            file, _ = read_trace(recorder.path)
            assert (file.complete, file.end["alive"]) == (True, [sleeper])


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "300"])
    yield process.pid
    assert process.poll() is None, "was harmed"
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_it_prepares_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    script = f"touch {tmp_path / 'ran'}"
    with Recorder(tmp_path, "--", "sh", "-c", script, env={"TMPDIR": str(tmp_path)}) as recorder:
        wait_until(lambda: list(tmp_path.glob("vmatrace-*")), "never compiled")
        recorder.tell(number)
        assert recorder.end() == 128 + number
        assert "Traceback" not in recorder.said()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["t.vmat.stderr"]


# ---- hostile surroundings ----------------------------------------------------------------------------------


def test_names_are_harmless_on_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "new\nerror: forged\033[2J"
    folder.mkdir()
    script = folder / "run\033]0;title\a\nwarning: forged"
    script.write_text("#!/bin/sh\nexit 4\n")
    script.chmod(0o755)
    done = subprocess.run([VMATRACE, "record", "--", script], cwd=folder, capture_output=True, timeout=60)
    assert done.returncode == 4
    made = [entry.name for entry in folder.iterdir() if entry != script]
    assert made == ["run__0_title__warning__forged.vmat"]
    for raw in (b"\033", b"\a", b"\nwarning: forged", b"\nerror: forged"):
        assert raw not in done.stderr
    assert b"\\012" in done.stderr


def test_a_sudo_user_gets_the_file_and_a_link_is_not_followed(tmp_path: Path) -> None:
    victim, trace = tmp_path / "victim", tmp_path / "t.vmat"
    victim.write_text("precious")
    trace.symlink_to(victim)
    user = {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY)}
    with Recorder(tmp_path, "--force", "--", "true", env=user) as recorder:
        assert recorder.end() == 0, recorder.said()
    assert victim.read_text() == "precious"
    assert victim.stat().st_uid == os.geteuid()
    found = trace.lstat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (NOBODY, NOBODY)


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) { static long n; return n++ % 3 * 86400 * (n % 2 ? 1 : -1); }
int clock_gettime(clockid_t id, struct timespec *t)
{
	static int (*real)(clockid_t, struct timespec *);
	if (!real)
		real = dlsym(RTLD_NEXT, "clock_gettime");
	int done = real(id, t);
	if (id == CLOCK_REALTIME)
		t->tv_sec += jump();
	return done;
}
time_t time(time_t *at)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return at ? *at = t.tv_sec : t.tv_sec;
}
"""


def test_a_clock_that_steps_moves_nothing(tmp_path: Path) -> None:
    """The wall clock of the recorder jumps by days at each look."""
    library = tmp_path / "clock.so"
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    before = time.monotonic_ns()
    with Recorder(tmp_path, "--duration", "0.7", "--", "sleep", "1", env={"LD_PRELOAD": str(library)}) as recorder:
        assert recorder.end() == 0
    file, tables = read_trace(recorder.path, "time", "index")
    assert file.end["reason"] == "the duration is over"
    times = [row["time"] for rows in tables.values() for row in rows if row]
    assert before < min(times)
    assert max(times) < time.monotonic_ns()
    sections = sorted(tables["sections"], key=lambda row: row["index"])
    assert [row["time"] for row in sections] == sorted(row["time"] for row in sections)
