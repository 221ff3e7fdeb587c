"""What a recording is asked for, and how it ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path

from vmatrace.capture.decisions import WAYS, Way
from vmatrace.errors import VmatraceError


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to record and where to. Exactly one of ``command``, ``pids``, ``everything`` is given.

    ``stacks``: keep the user stack of each call. ``ways``: how functions may be probed, the best first.
    """

    output: Path
    command: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    everything: bool = False
    user: str | None = None
    duration: float | None = None
    force: bool = False
    max_size: int | None = None
    ring_bytes: int = 16 << 20
    max_spaces: int = 1024
    layer: str = "auto"
    stacks: bool = False
    ways: tuple[Way, ...] = WAYS


@dataclass(slots=True)
class Outcome:
    """How a recording ended.

    ``status``: exit status of the command, 0 without one. ``signal``: what ended it before its time.
    """

    path: Path
    status: int = 0
    reason: str = ""
    records: int = 0
    lost: int = 0
    written: int = 0
    alive: tuple[int, ...] = ()
    signal: signal.Signals | None = None
    trouble: list[VmatraceError] = field(default_factory=list)
    cpu_ns: int = 0
