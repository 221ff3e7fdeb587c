"""The Python front door: record a trace, open one, and get operations, timelines, verdicts and frames."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape as html_escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vmatrace import frames, ingest
from vmatrace.errors import UsageError, nearest
from vmatrace.replay import ReplayResult, run
from vmatrace.timeline import Timeline, timelines

if TYPE_CHECKING:
    import pandas as pd

    from vmatrace.kernel import RuleSet


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """What a trace is about.

    ``duration`` is ns from the first to the last record; ``warning`` says where and why an incomplete trace
    stops, else it is empty; ``lost_records`` is how many records the recording is known to have lost.
    """

    path: Path
    kernel: str
    arch: str
    page_size: int
    layers: tuple[str, ...]
    command: tuple[str, ...]
    pids: tuple[int, ...]
    operations: int
    duration: int
    lost_records: int
    complete: bool
    warning: str


class Trace:
    """One trace, opened for reading; `vmatrace.open` makes it. Needs neither root nor BPF."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the trace at ``path``; raises `vmatrace.errors.BadTrace` where it is none."""
        self.data = ingest.Trace(path)

    @property
    def info(self) -> TraceInfo:
        """What was recorded, where, and whether all of it is there."""
        data = self.data
        return TraceInfo(
            path=Path(data.path),
            kernel=str(data.kernel.get("release", "")),
            arch=data.arch,
            page_size=data.page_size,
            layers=tuple(data.header.get("layers", ())),
            command=tuple(data.header.get("command", ())),
            pids=tuple(data.pids()),
            operations=len(data.operations),
            duration=data.records.last_time - data.records.first_time,
            lost_records=data.lost_records,
            complete=data.complete,
            warning=data.warning,
        )

    def operations(self, pid: int | None = None) -> Iterator[ingest.Operation]:
        """All operations in the order in which they began; of one process where ``pid`` is given."""
        return (each for each in self.data.iter_operations() if pid is None or each.pid == pid)

    def timeline(self, pid: int | None = None) -> Timeline:
        """The timeline of a process's last address space (None: of the first traced process).

        Raises UsageError where the process is not in the trace.
        """
        return self.timelines(pid)[-1]

    def timelines(self, pid: int | None = None) -> list[Timeline]:
        """The timelines of all address spaces that a process lived in, oldest first."""
        return timelines(self.data, pid)

    def replay(self, rules: str | RuleSet = "auto", without: Sequence[str] = ()) -> ReplayResult:
        """Judge each operation by the rules of a kernel; ``without``: ids of rules to switch off."""
        return run(self.data, rules, without)

    def frame(self, kind: str = "operations") -> pd.DataFrame:
        """A pandas frame: ``operations``, ``events``, ``vmas`` (over time), ``verdicts`` (rules auto) or ``decisions``.

        Columns are documented in `vmatrace.frames.COLUMNS`.
        """
        makers: dict[str, Callable[[], pd.DataFrame]] = {
            "operations": lambda: frames.operations_frame(self.data),
            "events": lambda: frames.events_frame(self.data),
            "vmas": lambda: frames.vmas_frame(self.data),
            "verdicts": lambda: frames.verdicts_frame(self.replay()),
            "decisions": lambda: frames.decisions_frame(self.data, self.replay()),
        }
        if kind not in makers:
            near = nearest(kind, makers) or "one of " + ", ".join(makers)
            raise UsageError(f"frame {kind!r}: not known", near)
        return makers[kind]()

    def close(self) -> None:
        """Close the file."""
        self.data.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        state = "complete" if info.complete else "incomplete"
        return f"<Trace {info.path}: {info.operations} operations, Linux {info.kernel} {info.arch}, {state}>"

    def _repr_html_(self) -> str:
        info = self.info
        rows = {
            "file": str(info.path),
            "command": " ".join(info.command),
            "kernel": f"Linux {info.kernel}, {info.arch}, pages of {info.page_size} bytes",
            "processes": " ".join(map(str, info.pids)),
            "operations": f"{info.operations} in {info.duration / 1e9:.3f} s",
            "lost records": str(info.lost_records),
            "complete": "yes" if info.complete else f"no: {info.warning}",
        }
        cells = (f"<tr><th>{name}</th><td>{html_escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{''.join(cells)}</table>"


def open(path: str | os.PathLike[str]) -> Trace:
    """Open a trace file. Raises `vmatrace.errors.BadTrace` where it is none, naming what is wrong with it."""
    return Trace(path)


def record(
    command: Sequence[str] = (),
    *,
    output: str | os.PathLike[str] | None = None,
    pids: Sequence[int] = (),
    everything: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Path:
    """Record a command, running processes or everything, until it ends; return the path of the trace.

    Exactly one of ``command``, ``pids`` and ``everything`` is given. ``output`` is named after the command or
    PID by default. ``say`` is handed each line of progress. ``options``: further fields of
    `vmatrace.capture.wanted.Wanted` (``user``, ``duration`` in s, ``force``, ``max_size`` in bytes, ...).
    Raises `vmatrace.errors.CannotTrace` where this kernel cannot be traced or does not permit it.
    """
    # Only here is bcc needed: reading traces must work where it is absent.
    from vmatrace.capture.session import record as capture
    from vmatrace.capture.wanted import Wanted

    name = Path(command[0]).name if command else "-".join(map(str, pids)) or "all"
    path = Path(output) if output is not None else Path(f"{name}.vmat")
    wanted = Wanted(path, tuple(command), tuple(pids), everything, **options)
    return capture(wanted, say).path
