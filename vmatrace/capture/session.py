"""A recording from start to end: what is traced, when it ends, what goes to the file, how it fails."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import select
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from vmatrace import btf as kernel_btf
from vmatrace import tracefile
from vmatrace.capture import target as targets
from vmatrace.capture.decode import Cloak, Columns, Decoder
from vmatrace.capture.operations import TRACEPOINTS, Operations
from vmatrace.capture.snapshot import SpaceView, find_place, snapshot_tables, split_views
from vmatrace.errors import CannotTrace, UsageError, VmatraceError
from vmatrace.fingerprint import live_profile

FLUSH_NS = 500_000_000
CHUNK_CELLS = 1 << 17
POLL_S = 0.01
SNAPSHOT_TRIES = 10
FREE_RESERVE = 64 << 20
INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO
SYSCTLS = ("vm.max_map_count", "vm.overcommit_memory", "vm.stack_guard_gap", "vm.mmap_min_addr")
_PR_CAPBSET_READ, _CAP_IPC_LOCK = 23, 14
_RLIMITS = {
    "RLIMIT_AS": resource.RLIMIT_AS,
    "RLIMIT_DATA": resource.RLIMIT_DATA,
    "RLIMIT_STACK": resource.RLIMIT_STACK,
    "RLIMIT_MEMLOCK": resource.RLIMIT_MEMLOCK,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to record and where to. Exactly one of ``command``, ``pids``, ``everything`` is given."""

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


@dataclass(slots=True)
class Outcome:
    """How a recording ended. ``status``: exit status of the command, 0 without one."""

    path: Path
    status: int = 0
    reason: str = ""
    records: int = 0
    lost: int = 0
    written: int = 0
    alive: tuple[int, ...] = ()
    interrupted: bool = False
    trouble: list[VmatraceError] = field(default_factory=list)
    cpu_ns: int = 0


def check_possible() -> None:
    """Raise `CannotTrace` where tracing needs more than this process has."""
    if os.geteuid() != 0:
        raise CannotTrace("recording: needs root", "run it with sudo")
    if not Path("/sys/kernel/btf/vmlinux").exists():
        raise CannotTrace("BTF, /sys/kernel/btf/vmlinux: not there", "a kernel with CONFIG_DEBUG_INFO_BTF is needed")


class Session:
    """One recording. `run` does all; the rest is its steps."""

    def __init__(self, wanted: Wanted, say: Callable[[str], None]) -> None:
        self.wanted = wanted
        self.say = say
        self.outcome = Outcome(wanted.output)
        self.cloak = Cloak()
        self.decoder = Decoder(self.cloak)
        self._flushed = time.monotonic_ns()
        self._lost_seen = 0
        self._sysctls: dict[str, int] = {}
        self._signals = 0
        self._writing = True

    def run(self) -> Outcome:
        """Record until the end. Raises before the command has started; later troubles are in the outcome."""
        check_possible()
        child = targets.start(self.wanted.command, self.wanted.user) if self.wanted.command else None
        try:
            # The programs that tell the kernel's features run while the compiler works, before any hook is armed.
            with ThreadPoolExecutor(1) as beside:
                profile = beside.submit(lambda: live_profile(kernel_btf.load()))
                self.layer = Operations(ring_bytes=self.wanted.ring_bytes, max_spaces=self.wanted.max_spaces)
                self.profile = profile.result()
        except BaseException:
            if child:
                child.abandon()
            raise
        try:
            with self._catch_signals():
                self._open(child)
                self._start(child)
                self._loop(child)
                self._finish(child)
        except BaseException:
            if child:
                child.abandon()
            raise
        finally:
            self.layer.close()
        if child and not self.outcome.interrupted:
            self._wait(child)
        return self.outcome

    # ---- start ----

    def _open(self, child: targets.Target | None) -> None:
        header = {
            "kernel": self.profile.with_probes(dict.fromkeys(TRACEPOINTS, "used")).to_dict(),
            "machine": platform.machine(),
            "command": list(self.wanted.command),
            "pids": [child.pid] if child else list(self.wanted.pids),
            "everything": self.wanted.everything,
            "layers": ["operations"],
            "clocks": {"monotonic": time.monotonic_ns(), "realtime": time.time_ns()},
            "cpus": os.cpu_count(),
        }
        self.writer = tracefile.TraceWriter(self.wanted.output, header, force=self.wanted.force)

    def _discard(self) -> None:
        """Nothing was recorded: leave no file behind."""
        self.writer.close()
        self.wanted.output.unlink(missing_ok=True)

    def _start(self, child: targets.Target | None) -> None:
        self.layer.attach()
        self._write_limits()
        if child:
            self.layer.expect(child.secret)
            try:
                child.release()
                self.layer.expect(0)
            except VmatraceError:
                self._discard()
                raise
            self.say(f"tracing {self.wanted.command[0]} (PID {child.pid}) and its children; Ctrl-C goes to it")
        else:
            self._adopt_running()
        self._began = time.monotonic()

    def _adopt_running(self) -> None:
        """Register what runs already and take a consistent first look at it."""
        if self.wanted.everything:
            self.layer.trace_all()
        if self.wanted.pids and os.readlink("/proc/self/ns/pid") != INITIAL_PID_NAMESPACE:
            self._discard()
            raise CannotTrace("-p in a PID namespace: the kernel tells PIDs of the initial one", "record from there")
        for pid in self.wanted.pids:
            self.layer.trace_process(pid)
        views = [view for view in split_views(self.layer.snapshot()) if view.pid != os.getpid()]
        found = {view.pid for view in views}
        for pid in self.wanted.pids:
            if pid not in found:
                self._discard()
                raise UsageError(f"PID {pid}: no such process, or it has no address space", "see `ps`")
        open_mms = {view.mm for view in views}
        for mm in open_mms:
            self.layer.register(mm)
        left = self._snapshot(open_mms, introduce=True)
        if left:
            self.say(f"warning: {len(left)} address spaces changed all the while; they are unknown until read again")
        who = "all processes" if self.wanted.everything else "PID " + " ".join(map(str, self.wanted.pids))
        self.say(f"tracing {who}; Ctrl-C ends it")

    def _snapshot(self, mms: set[int] | None, *, introduce: bool) -> set[int]:
        """Read registered address spaces whole and put them in their place; return those never consistent."""
        wanted = set(self.layer.registered()) if mms is None else set(mms)
        for _ in range(SNAPSHOT_TRIES):
            if not wanted:
                break
            views = [v for v in split_views(self.layer.snapshot()) if v.mm in wanted and v.consistent and v.space]
            if views:
                self._place(views, introduce)
                wanted -= {view.mm for view in views}
        return wanted

    def _place(self, views: list[SpaceView], introduce: bool) -> None:
        """Everything older is written first; what the ring holds now may be newer than a view."""
        self._flush()
        self.layer.ring.fill()
        words, heads = self.layer.ring.take()
        base = self.decoder.records
        indices = [2 * (base + find_place(words, heads, view.space, view.seq)) + 1 for view in views]
        if len(heads):
            self._write(self.decoder.decode(words, heads))
        self._write(snapshot_tables(views, indices, self.cloak, introduce=introduce))

    # ---- middle ----

    def _loop(self, child: targets.Target | None) -> None:
        deadline = self._began + self.wanted.duration if self.wanted.duration else None
        poll = select.poll()
        if child:
            poll.register(child.pidfd, select.POLLIN)
        checked = 0.0
        while True:
            busy = self._drain()
            if child:
                status = child.status()
                if status is not None:
                    self.outcome.status = status
                    self.outcome.reason = "the command ended"
                    return
            now = time.monotonic()
            if not child and now - checked > 0.2:
                checked = now
                if not self.layer.registered():
                    self.outcome.reason = "all traced processes ended"
                    return
            if deadline and now >= deadline:
                self.outcome.reason = "the duration is over"
                return
            if self._signals > (1 if child else 0):
                self.outcome.reason = "interrupted"
                self.outcome.interrupted = True
                return
            if not self._writing and not child:
                return
            if not busy:
                with contextlib.suppress(InterruptedError):
                    poll.poll(POLL_S * 1000) if child else time.sleep(POLL_S)

    def _drain(self) -> bool:
        """Take what the ring holds; write when the buffer fills or half a second has passed. True: come again at once."""
        ring = self.layer.ring
        came = ring.fill()
        if ring.filled >= CHUNK_CELLS:
            self._flush()
        now = time.monotonic_ns()
        if now - self._flushed >= FLUSH_NS:
            self._flushed = now
            self._flush()
            self._watch()
        return came > CHUNK_CELLS // 4

    def _flush(self) -> None:
        words, heads = self.layer.ring.take()
        if len(heads):
            self._write(self.decoder.decode(words, heads))

    def _write(self, tables: dict[str, Columns]) -> None:
        if not self._writing or not tables:
            return
        try:
            self.writer.write(tables)
        except VmatraceError as error:
            self._writing = False
            self.outcome.trouble.append(error)
            self.outcome.reason = "the trace could not be written"

    def _watch(self) -> None:
        """Twice a second: losses, changed sysctls, room on the disk."""
        lost = sum(self.layer.counts()["lost"])
        if lost > self._lost_seen:
            self._note_loss(lost - self._lost_seen)
            self._lost_seen = lost
            self._snapshot(None, introduce=False)
        self._write_limits()
        if not self._writing:
            return
        too_big = self.wanted.max_size is not None and self.writer.bytes_written >= self.wanted.max_size
        disk = shutil.disk_usage(self.wanted.output.parent)
        if too_big or disk.free < min(FREE_RESERVE, disk.total // 20):
            why = "the trace reached --max-size" if too_big else "the disk is nearly full"
            self._writing = False
            self.outcome.reason = why
            self.outcome.trouble.append(VmatraceError(f"{self.wanted.output}: {why}", "what was written stays readable"))

    def _note_loss(self, lost: int) -> None:
        self._write(
            {"losses": {"index": [2 * self.decoder.records + 1], "time": [time.monotonic_ns()], "lost": [lost]}}
        )

    def _write_limits(self) -> None:
        """Sysctls that decide, at the start and when they change; at the start the command's own limits too."""
        rows: list[tuple[int, str, int]] = []
        for name in SYSCTLS:
            with contextlib.suppress(OSError, ValueError):
                value = int(Path("/proc/sys", *name.split(".", 1)).read_text())
                if self._sysctls.get(name) != value:
                    self._sysctls[name] = value
                    rows.append((0, name, value))
        if self.decoder.records == 0 and not self._lost_seen and rows:
            rows += _process_limits(self.wanted.pids)
        if rows:
            many = len(rows)
            self._write(
                {
                    "limits": {
                        "index": np.full(many, 2 * self.decoder.records + 1),
                        "time": np.full(many, time.monotonic_ns()),
                        "pid": [row[0] for row in rows],
                        "name": [row[1] for row in rows],
                        "value": np.array([row[2] for row in rows], dtype=np.uint64),
                    }
                }
            )

    # ---- end ----

    def _finish(self, child: targets.Target | None) -> None:
        """Last look at what lives on, then detach, drain and close the file."""
        alive: set[int] = set()
        if self.layer.registered():
            with contextlib.suppress(CannotTrace):
                self._snapshot(None, introduce=False)
                alive = {view.pid for view in split_views(self.layer.snapshot()) if view.space}
        self.layer.detach()
        counts, spaces = self.layer.counts(), self.layer.space_seqs()
        if no_room := sum(counts["no_space"]):
            self.outcome.trouble.append(
                VmatraceError(f"{no_room} address spaces found no room and were not traced", "trace fewer processes")
            )
        self._flush()
        while self.layer.ring.fill():
            self._flush()
        lost = sum(counts["lost"])
        if lost > self._lost_seen:
            self._note_loss(lost - self._lost_seen)
        self.outcome.alive = tuple(sorted(alive))
        self.outcome.records = self.decoder.records
        self.outcome.lost = lost
        end: dict[str, Any] = {
            "reason": self.outcome.reason,
            "records": self.decoder.records,
            "lost": lost,
            "cpu_seq": counts["records"],
            "spaces": [space for space, _ in spaces],
            "space_seq": [seq for _, seq in spaces],
            "alive": list(self.outcome.alive),
        }
        try:
            if self._writing:
                self.writer.finish(end)
            else:
                self.writer.close()
        except VmatraceError as error:
            self.outcome.trouble.append(error)
        self.outcome.written = self.writer.bytes_written
        self.outcome.cpu_ns = time.process_time_ns()

    def _wait(self, child: targets.Target) -> None:
        """The recording is over before the command is: its status is still ours to pass on."""
        status = child.status()
        while status is None:
            time.sleep(0.02)
            status = child.status()
        self.outcome.status = status

    @contextlib.contextmanager
    def _catch_signals(self) -> Any:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals == 1 and self.wanted.command:
                self.say("waiting for the command; once more detaches and ends the recording")

        saved = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)


def _process_limits(pids: Sequence[int]) -> list[tuple[int, str, int]]:
    """Limits of the given processes, or our own, which a command inherits; RLIM_INFINITY is 2**64 - 1."""
    rows = []
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in pids or (0,):
        for name, number in _RLIMITS.items():
            with contextlib.suppress(OSError):
                soft, _ = resource.prlimit(pid, number)
                rows.append((pid or os.getpid(), name, soft % 2**64))
        capable = int(libc.prctl(_PR_CAPBSET_READ, _CAP_IPC_LOCK, 0, 0, 0) == 1)
        rows.append((pid or os.getpid(), "CAP_IPC_LOCK", capable))
    return rows


def record(wanted: Wanted, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Record as ``wanted``; ``say`` gets progress lines. Raises `VmatraceError` when nothing was recorded."""
    if sum((bool(wanted.command), bool(wanted.pids), wanted.everything)) != 1:
        raise UsageError("record: wants one of -- CMD, -p PID, --all", "see `vmatrace record --help`")
    return Session(wanted, say).run()


