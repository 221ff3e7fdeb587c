"""The processes of a measurement: the storm being traced, and whoever traces it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VMATRACE = Path(sys.executable).with_name("vmatrace")
START_TIMEOUT_S = 60.0


class Storm:
    """One ``storm --wait-for-go`` process; each `go` is a round of its loop."""

    def __init__(self, program: Path, what: str, amount: int, rounds: int = 1) -> None:
        self.what = what
        self._process = subprocess.Popen(
            [program, what, str(amount), "--rounds", str(rounds), "--wait-for-go"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid
        self._expect_ready()

    def _expect_ready(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line not in (b"ready\n", b""):
            raise RuntimeError(f"storm {self.what}: said {line!r}")

    def go(self) -> dict[str, Any]:
        """Run one round and return what it printed; the storm waits again, or is gone after its last one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"g")
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        self._expect_ready()
        return result

    def end(self) -> None:
        """Let it go; closing its standard input is enough."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


@dataclass(slots=True)
class Recorder:
    """A running ``vmatrace record`` and what was seen of it. CPU in seconds, ``size`` in bytes."""

    process: subprocess.Popen[bytes]
    output: Path
    errors: Path
    ready_s: float
    cpu_at_ready: float
    cpu: float = 0.0
    size: int = 0
    said: list[str] = field(default_factory=list)

    def finish(self, timeout: float = 180.0) -> int:
        """Wait for its own end and collect its CPU time after the start, size and last words."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"vmatrace record did not end within {timeout} s")
            time.sleep(0.01)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu = usage.ru_utime + usage.ru_stime - self.cpu_at_ready
        self.size = self.output.stat().st_size if self.output.exists() else 0
        self.said = self.errors.read_text(errors="replace").splitlines()
        return self.process.returncode


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process until now, from their schedstat (ns resolution)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def start_recorder(output: Path, arguments: Sequence[str]) -> Recorder:
    """Start ``vmatrace record`` and return when it says that it traces."""
    errors = output.with_suffix(".stderr")
    before = time.monotonic()
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [VMATRACE, "record", "--force", "-o", output, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    _wait_for(errors, "tracing", process)
    return Recorder(process, output, errors, time.monotonic() - before, cpu_seconds(process.pid))


def _wait_for(path: Path, word: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        text = path.read_text(errors="replace") if path.exists() else ""
        if word in text:
            return
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r}: ended with {process.returncode}: {text.strip()}")
        time.sleep(0.005)
    process.kill()
    raise RuntimeError(f"{process.args!r}: said nothing within {START_TIMEOUT_S} s")


@contextlib.contextmanager
def untraced(pids: Sequence[int], directory: Path) -> Iterator[None]:
    """Nobody looks on."""
    yield


@contextlib.contextmanager
def under_vmatrace(pids: Sequence[int], directory: Path) -> Iterator[Recorder]:
    """`vmatrace record -p` of all of them; it ends by itself when they have ended."""
    recorder = start_recorder(directory / "storm.vmat", [word for pid in pids for word in ("-p", str(pid))])
    yield recorder
    # The storms are waiting still: the recorder is told to end, as a user would.
    recorder.process.send_signal(signal.SIGINT)
    recorder.finish()


@contextlib.contextmanager
def under_strace(pids: Sequence[int], directory: Path) -> Iterator[None]:
    """`strace -f -e trace=memory -o FILE -p`."""
    errors = directory / "strace.stderr"
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            ["strace", "-f", "-e", "trace=memory", "-o", str(directory / "strace.out")]
            + [word for pid in pids for word in ("-p", str(pid))],
            stderr=stream,
        )
    for pid in pids:
        _wait_for(errors, f"Process {pid} attached", process)
    yield
    _interrupt(process)


BPFTRACE = """
tracepoint:syscalls:sys_enter_mmap /{who}/
{{ printf("%d mmap %lx %lu %lu %lu\\n", tid, args->addr, args->len, args->prot, args->flags); }}
tracepoint:syscalls:sys_enter_munmap /{who}/ {{ printf("%d munmap %lx %lu\\n", tid, args->addr, args->len); }}
tracepoint:syscalls:sys_enter_mprotect /{who}/
{{ printf("%d mprotect %lx %lu %lu\\n", tid, args->start, args->len, args->prot); }}
tracepoint:syscalls:sys_exit_mmap /{who}/ {{ printf("%d = %lx\\n", tid, args->ret); }}
tracepoint:syscalls:sys_exit_munmap /{who}/ {{ printf("%d = %d\\n", tid, args->ret); }}
tracepoint:syscalls:sys_exit_mprotect /{who}/ {{ printf("%d = %d\\n", tid, args->ret); }}
"""


@contextlib.contextmanager
def under_bpftrace(pids: Sequence[int], directory: Path) -> Iterator[None]:
    """A bpftrace one-liner that writes the arguments and results of the same calls to a file."""
    program = BPFTRACE.format(who=" || ".join(f"pid == {pid}" for pid in pids))
    output, errors = directory / "bpftrace.out", directory / "bpftrace.stderr"
    output.unlink(missing_ok=True)
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            ["bpftrace", "-o", output, "-e", program],
            env={**os.environ, "BPFTRACE_PERF_RB_PAGES": "256"},
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    _wait_for_programs(BPFTRACE.count("tracepoint:"), process)
    yield
    _interrupt(process)


def _wait_for_programs(more: int, process: subprocess.Popen[bytes]) -> None:
    """bpftrace holds its output back, its first line too: its programs being there says that it is ready."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        held = 0
        for entry in Path(f"/proc/{process.pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                held += "prog_id" in entry.read_text()
        if held >= more:
            # Attached one after the other, within milliseconds of being loaded.
            time.sleep(0.3)
            return
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"bpftrace: not ready within {START_TIMEOUT_S} s, or ended early")


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C; a tracer that does not end then (bpftrace 0.17 can stay for minutes) is killed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


TRACERS = {
    "untraced": untraced,
    "vmatrace": under_vmatrace,
    "strace": under_strace,
    "bpftrace": under_bpftrace,
}


def available(tracer: str) -> bool:
    """Whether the program behind a tracer is there."""
    if tracer == "untraced":
        return True
    return VMATRACE.exists() if tracer == "vmatrace" else shutil.which(tracer) is not None


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
