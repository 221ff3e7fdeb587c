"""Limits that decide what calls may do: sysctls of the machine, and limits of the traced processes."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Sequence
from pathlib import Path

SYSCTLS = ("vm.max_map_count", "vm.overcommit_memory", "vm.stack_guard_gap", "vm.mmap_min_addr")
_CAP_IPC_LOCK = 14
_RLIMITS = {
    "RLIMIT_AS": resource.RLIMIT_AS,
    "RLIMIT_DATA": resource.RLIMIT_DATA,
    "RLIMIT_STACK": resource.RLIMIT_STACK,
    "RLIMIT_MEMLOCK": resource.RLIMIT_MEMLOCK,
}
Row = tuple[int, str, int]
"""PID (0: the whole machine), name, value."""


class SysctlWatch:
    """Remembers the machine's limits and tells which have changed."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def changed(self) -> list[Row]:
        """Those that differ from the last call; at first all that can be read."""
        rows: list[Row] = []
        for name in SYSCTLS:
            with contextlib.suppress(OSError, ValueError):
                value = int(Path("/proc/sys", *name.split(".", 1)).read_text())
                if self._known.get(name) != value:
                    self._known[name] = value
                    rows.append((0, name, value))
        return rows


def process_limits(pids: Sequence[int], *, privileged: bool = True) -> list[Row]:
    """Limits of the given processes, or our own, which a command inherits; RLIM_INFINITY is 2**64 - 1.

    ``privileged``: whether a command keeps the capabilities that we have.
    """
    rows: list[Row] = []
    for pid in pids or (0,):
        for name, number in _RLIMITS.items():
            with contextlib.suppress(OSError):
                soft, _ = resource.prlimit(pid, number)
                rows.append((pid or os.getpid(), name, soft % 2**64))
        with contextlib.suppress(OSError):
            capable = effective_capabilities(pid or "self") >> _CAP_IPC_LOCK & 1
            rows.append((pid or os.getpid(), "CAP_IPC_LOCK", capable if pid or privileged else 0))
    return rows


def effective_capabilities(pid: int | str) -> int:
    """The effective capabilities of a process, a bit each; raises OSError where it is gone, or /proc is."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
