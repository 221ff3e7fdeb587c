"""Holds a `vmatrace record` that runs beside a test: its words, its end, its BPF programs, its trace."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmatrace.tracefile import TraceFile

VMATRACE = Path(sys.executable).with_name("vmatrace")
PATIENCE_S = 120
_BPF = {"x86_64": 321, "aarch64": 280}
_BPF_PROG_GET_FD_BY_ID = 13


def wait_until(what: Callable[[], Any], why: str) -> Any:
    """The first true value of ``what``; fails with ``why`` when the machine's patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, why
        time.sleep(0.01)
    return found


class Recorder:
    """One `vmatrace record` process; ``words`` are its arguments behind ``-o FILE``."""

    def __init__(
        self,
        folder: Path,
        *words: str | Path,
        name: str = "t.vmat",
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        **more: Any,
    ) -> None:
        self.path = folder / name
        self.errors = folder / (name + ".stderr")
        command = [*before, str(VMATRACE), "record", "-o", str(self.path), *map(str, words)]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=more.pop("stdin", subprocess.DEVNULL),
                stdout=more.pop("stdout", subprocess.PIPE),
                stderr=more.pop("stderr", errors),
                env={**os.environ, **(env or {})},
                **more,
            )
        self.output = b""

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def said(self) -> str:
        """What it has written to stderr so far."""
        return self.errors.read_text(errors="surrogateescape")

    def wait_for(self, text: str) -> None:
        """Until it has said ``text``."""
        wait_until(lambda: text in self.said() or self.process.poll() is not None, f"never said {text!r}")
        assert text in self.said(), f"ended with {self.process.poll()}: {self.said()}"

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Its exit status, once it has ended; what it printed is in ``output``."""
        self.output = self.process.communicate(timeout=PATIENCE_S)[0] or b""
        return self.process.returncode

    def programs(self) -> set[int]:
        """Ids of the BPF programs that it holds, attached or not."""
        found = set()
        for info in Path(f"/proc/{self.process.pid}/fdinfo").iterdir():
            for line in info.read_text().splitlines():
                if line.startswith("prog_id:"):
                    found.add(int(line.split()[1]))
        return found


def assert_programs_gone(programs: set[int]) -> None:
    """None of these BPF programs is loaded any more (the kernel lets them go a moment later)."""
    assert programs
    wait_until(lambda: not any(program_is_loaded(number) for number in programs), f"programs stay: {programs}")


def program_is_loaded(number: int) -> bool:
    """Whether the kernel has a BPF program with this id."""
    attr = ctypes.create_string_buffer(struct.pack("<III", number, 0, 0), 64)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_BPF[platform.machine()], _BPF_PROG_GET_FD_BY_ID, attr, 64)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


Rows = list[dict[str, Any]]


def read_trace(path: Path, *columns: str) -> tuple[TraceFile, dict[str, Rows]]:
    """A trace's file and the rows of its tables, with these columns of numbers (those that a table has)."""
    file = TraceFile(path)
    tables: dict[str, Rows] = {}
    for batch in file.batches():
        for name, table in batch.items():
            there = [column for column in columns if column in table]
            values = [table[column].tolist() for column in there]
            found = [dict(zip(there, row, strict=True)) for row in zip(*values, strict=True)]
            tables.setdefault(name, []).extend(found or [{} for _ in range(table.rows)])
    return file, tables


def holes(path: Path) -> int:
    """Records missing from a trace, by the counts of the CPUs."""
    file, tables = read_trace(path, "cpu", "parts")
    made = [table for name, table in tables.items() if name != "limits"]  # those are the recorder's own
    rows = [row for table in made for row in table if row.get("cpu", 0xFFFF) != 0xFFFF]
    return sum(file.end["cpu_seq"]) - sum(row.get("parts", 1) for row in rows)
