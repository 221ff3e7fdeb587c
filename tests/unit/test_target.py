"""The command to be traced: held at its gate, its status passed on, nothing of ours left in it."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmatrace.capture import precheck, target
from vmatrace.capture.interrupts import Interrupts
from vmatrace.errors import UsageError, VmatraceError


def end_of(child: target.Target) -> int:
    while (status := child.status()) is None:
        time.sleep(0.005)
    return status


def run(*command: str) -> int:
    child = target.start(command)
    child.release()
    return end_of(child)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No descriptor and no child may outlive a test (but for a target's pidfd, which dies with us)."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = [os.readlink(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before if _is_open(fd)]
    assert [name for name in left if "pidfd" not in name] == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def _is_open(fd: str) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


@pytest.mark.parametrize("code", [0, 1, 7, 125, 255])
def test_the_status_is_the_commands_own(code: int) -> None:
    assert run("sh", "-c", f"exit {code}") == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE])
def test_a_death_by_signal_is_128_and_its_number(number: signal.Signals) -> None:
    assert run("sh", "-c", f"kill -{int(number)} $$") == 128 + number


def test_nothing_runs_before_the_gate_opens(tmp_path: Path) -> None:
    child = target.start(["touch", str(tmp_path / "made")])
    time.sleep(0.05)
    assert child.status() is None
    assert not (tmp_path / "made").exists()
    child.release()
    assert end_of(child) == 0
    assert (tmp_path / "made").exists()


def test_an_abandoned_command_never_runs(tmp_path: Path) -> None:
    child = target.start(["touch", str(tmp_path / "made")])
    child.abandon()
    assert not (tmp_path / "made").exists()
    child.abandon()


def test_a_command_that_runs_is_not_abandoned() -> None:
    child = target.start(["sh", "-c", "sleep 0.1; exit 5"])
    child.release()
    child.abandon()
    assert end_of(child) == 5


def test_one_killed_at_its_gate_has_a_status() -> None:
    child = target.start(["true"])
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.release()
    assert end_of(child) == 128 + signal.SIGKILL


@pytest.mark.parametrize("name", ["no-such-command-anywhere", "/no/such/file", "/etc/hostname/x", ""])
def test_what_is_not_there_is_127(name: str) -> None:
    with pytest.raises(VmatraceError, match="command not found") as raised:
        target.start([name])
    assert raised.value.exit_code == 127
    assert raised.value.hint


def test_what_cannot_be_executed_is_126(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("text")
    for name in (plain, tmp_path):
        with pytest.raises(VmatraceError) as raised:
            target.start([str(name)])
        assert raised.value.exit_code == 126


def test_what_only_the_kernel_can_refuse_is_126_or_127(tmp_path: Path) -> None:
    """No check beforehand tells: a file of no known format, an interpreter that is not there."""
    for text, code in ((b"\x7fELFnothing", 126), (b"#!/no/such/interpreter\n", 127)):
        file = tmp_path / "file"
        file.write_bytes(text)
        file.chmod(0o755)
        child = target.start([str(file)])
        with pytest.raises(VmatraceError) as raised:
            child.release()
        assert raised.value.exit_code == code


def test_a_command_that_vanishes_before_it_starts_is_127(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    child = target.start([str(script)])
    script.unlink()
    with pytest.raises(VmatraceError, match="not found") as raised:
        child.release()
    assert raised.value.exit_code == 127


def test_signals_and_descriptors_are_as_without_us(tmp_path: Path) -> None:
    """Python ignores SIGPIPE and SIGXFSZ for itself; a command must inherit neither that nor our files."""
    script = "{ ls /proc/self/fd; grep -E 'Sig(Ign|Blk|Cgt)' /proc/self/status; umask; pwd; ps -o pgid= $$; } > "
    assert run("sh", "-c", script + str(tmp_path / "ours")) == 0
    subprocess.run(["sh", "-c", script + str(tmp_path / "due")], close_fds=False, check=True)
    assert (tmp_path / "ours").read_text() == (tmp_path / "due").read_text()


def test_an_ignored_interrupt_stays_ignored() -> None:
    saved = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("sh", "-c", "kill -INT $$; exit 3") == 3
    finally:
        signal.signal(signal.SIGINT, saved)


def test_an_unknown_user_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no-such-user"):
        target.start(["true"], "no-such-user")


def test_a_user_runs_the_command() -> None:
    me = pwd.getpwuid(os.geteuid())
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    child = target.start(
        ["sh", "-c", f'test "$(id -un) $HOME $USER" = "{me.pw_name} {me.pw_dir} {me.pw_name}"'], me.pw_name
    )
    child.release()
    assert end_of(child) == 0


# ---- processes that run already ----------------------------------------------------------------------------


def test_tasks_are_known_by_their_thread_group() -> None:
    parent = os.getppid()
    assert precheck.thread_groups([parent, parent, 1]) == (parent, 1) if parent != 1 else (1,)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**40])
def test_a_pid_that_is_gone_is_told(pid: int) -> None:
    with pytest.raises(UsageError, match=f"PID {pid}"):
        precheck.thread_groups([pid])


def test_the_recorder_does_not_trace_itself() -> None:
    with pytest.raises(UsageError, match="recorder itself"):
        precheck.thread_groups([os.getpid()])


def test_a_zombie_is_told() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(UsageError, match="ended already"):
        precheck.thread_groups([pid])
    os.waitpid(pid, 0)


# ---- signals to the recorder -------------------------------------------------------------------------------


def test_preparation_is_interrupted_at_once() -> None:
    interrupts = Interrupts(1)
    with interrupts.caught(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with interrupts.caught(), pytest.raises(SystemExit) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == 143


def test_one_interrupt_is_borne_for_the_commands_sake() -> None:
    interrupts = Interrupts(1)
    interrupts.running = True
    with interrupts.caught():
        assert not interrupts.to_tell()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked() is None
        assert interrupts.to_tell()
        assert not interrupts.to_tell(), "told once"
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked() == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked() == signal.SIGINT, "the first counts"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_reaches_only_us_ends_the_recording(number: signal.Signals) -> None:
    interrupts = Interrupts(1)
    interrupts.running = True
    before = signal.getsignal(number)
    with interrupts.caught():
        signal.raise_signal(number)
        assert interrupts.asked() == number
    assert signal.getsignal(number) == before


def test_nohup_is_kept() -> None:
    saved = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(0).caught():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, saved)
