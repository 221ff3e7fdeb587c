"""Runs vmatrace as a user would, and gives its answers as data: what the live workload tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.workloads.oracle import Line, difference, from_timeline, read_maps

VMATRACE = Path(sys.executable).with_name("vmatrace")
PAGE = os.sysconf("SC_PAGESIZE")
# Of the operations that changed a VMA, this share may stay undecided or skipped.
OPEN_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recording: the trace, the exit status of `vmatrace record`, and what the command printed."""

    path: Path
    status: int
    stdout: str
    stderr: str

    def timeline(self, pid: int | None = None) -> list[Line]:
        """The last state of a process (the first traced one), as lines of maps."""
        words = ["timeline", self.path, "--at", "end", "--format", "json"]
        if pid is not None:
            words += ["--pid", str(pid)]
        return from_timeline(vmatrace_json(*words)["vmas"], PAGE)

    def replay(self) -> dict[str, Any]:
        """The verdicts as JSON, where nothing could be decided (exit 4) too: the counts are there all the same."""
        return vmatrace_json("replay", self.path, "--format", "json", statuses=(0, 1, 4))


def vmatrace_json(*words: str | Path, statuses: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run a command of vmatrace that prints one JSON object."""
    done = subprocess.run([VMATRACE, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in statuses, f"{words}: {done.returncode}: {done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def record(path: Path, *command: str | Path, options: Sequence[str] = ()) -> Recorded:
    """Record a command into ``path``."""
    words = [VMATRACE, "record", "--force", "-o", path, *options, "--", *command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=200, check=False)
    return Recorded(path, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def assert_layout(recorded: Recorded, dump: Path, pid: int | None = None) -> None:
    """The timeline's end is the dump that the program made of itself."""
    due, got = read_maps(dump), recorded.timeline(pid)
    if got != due:
        lines = difference(due, got).splitlines()
        pytest.fail("\n".join([f"{recorded.path}: not what {dump} says:", *lines[:20]]), pytrace=False)


def assert_conforms(answer: dict[str, Any]) -> None:
    """Nothing FAILED, nothing lost, and hardly anything without a verdict."""
    assert answer["failed"] == 0, json.dumps(answer["divergences"][:5], indent=1)
    assert answer["trace"]["complete"] is True
    assert answer["lost_records"] == 0
    assert answer["passed"] > 0
    # What changed nothing may stay open: calls that failed for a reason that nobody captured.
    assert answer["changing_open"] <= OPEN_SHARE * answer["changing"], answer["undecided_reasons"]


def operations(answer: dict[str, Any], call: str) -> int:
    """How many operations of one system call a replay counted."""
    verdicts: dict[str, int] = answer["by_syscall"].get(call, {})
    return sum(verdicts.values())
