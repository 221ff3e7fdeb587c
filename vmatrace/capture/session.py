"""A recording from start to end: what is traced, when it ends, what goes to the file, how it fails."""

from __future__ import annotations

import contextlib
import os
import platform
import select
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vmatrace import __version__
from vmatrace.capture import target as targets
from vmatrace.capture.decisions import Decisions, decisions_wanted
from vmatrace.capture.headers import deaths_are_seen
from vmatrace.capture.interrupts import Interrupts
from vmatrace.capture.limits import SysctlWatch, process_limits
from vmatrace.capture.operations import TRACEPOINTS, Operations
from vmatrace.capture.precheck import (
    check_namespace,
    check_output,
    check_possible,
    no_such_process,
    thread_groups,
)
from vmatrace.capture.sink import Sink
from vmatrace.capture.snapshot import SpaceView, find_place, snapshot_tables, split_views
from vmatrace.capture.stacks import UserStacks
from vmatrace.capture.wanted import Outcome, Wanted
from vmatrace.errors import CannotTrace, UsageError, VmatraceError
from vmatrace.fingerprint import live_profile
from vmatrace.schema import CELL_BYTES

FLUSH_NS = 500_000_000
CHUNK_CELLS = 1 << 16
POLL_S = 0.01
SNAPSHOT_TRIES = 10


class Session:
    """One recording. `run` does all; the rest is its steps."""

    def __init__(self, wanted: Wanted, say: Callable[[str], None]) -> None:
        self.wanted = wanted
        self.say = say
        self.outcome = Outcome(wanted.output)
        self.layer: Operations
        self.decisions: Decisions | None = None
        self.sink: Sink
        self._flushed = time.monotonic_ns()
        self._lost_seen = 0
        self._chunk = min(CHUNK_CELLS, wanted.ring_bytes // CELL_BYTES // 4)
        self._sysctls = SysctlWatch()
        self._interrupts = Interrupts(1 if wanted.command else 0)

    def run(self) -> Outcome:
        """Record until the end. Raises before the command has started; later troubles are in the outcome."""
        btf = check_possible()
        self._deaths = deaths_are_seen(btf)
        if self.wanted.pids or self.wanted.everything:
            check_namespace("-p" if self.wanted.pids else "--all")
        self._pids = thread_groups(self.wanted.pids)
        check_output(self.wanted.output, self.wanted.force)
        plan = decisions_wanted(self.wanted.layer, btf)
        child = targets.start(self.wanted.command, self.wanted.user) if self.wanted.command else None
        try:
            with self._interrupts.caught():
                # The programs that tell the kernel's features run beside the compiler, before any hook.
                with ThreadPoolExecutor(1) as beside:
                    profile = beside.submit(lambda: live_profile(btf))
                    self.layer = Operations(
                        ring_bytes=self.wanted.ring_bytes,
                        max_spaces=self.wanted.max_spaces,
                        decisions=bool(plan),
                        stacks=self.wanted.stacks,
                    )
                    try:
                        self.profile = profile.result()
                        if plan:
                            self.decisions = Decisions(self.layer.program, plan, btf, self.wanted.ways)
                    except BaseException:
                        self.layer.close()
                        raise
                try:
                    self._interrupts.running = True
                    self._begin(child)
                    self._record(child)
                finally:
                    if self.decisions:
                        self.decisions.close()
                    self.layer.close()
                if child:
                    self._wait(child)
        finally:
            if child:
                child.abandon()
        return self.outcome

    # ---- start ----

    def _begin(self, child: targets.Target | None) -> None:
        """Open the file, arm the hooks, let the command go; where that fails, leave no file behind."""
        if self.decisions:
            self.decisions = self.decisions if self.decisions.attach(self.wanted.layer, self.say) else None
        self._open(child)
        try:
            self._start(child)
        except BaseException:
            self.sink.discard()
            raise

    def _open(self, child: targets.Target | None) -> None:
        header = {
            "vmatrace": __version__,
            "kernel": self.profile.with_probes(dict.fromkeys(TRACEPOINTS, "used")).to_dict(),
            "machine": platform.machine(),
            "command": list(self.wanted.command),
            "pids": [child.pid] if child else list(self._pids),
            "everything": self.wanted.everything,
            "layers": ["operations", *["decisions"] * bool(self.decisions), *["stacks"] * self.wanted.stacks],
            **({"decisions": self.decisions.header()} if self.decisions else {}),
            "evidence": {"births": True, "deaths": self._deaths, "credentials": True},
            "clocks": {"monotonic": time.monotonic_ns(), "realtime": time.time_ns()},
            "cpus": os.cpu_count(),
        }
        self.sink = Sink(
            self.wanted.output,
            header,
            force=self.wanted.force,
            max_size=self.wanted.max_size,
            spaces=self.wanted.max_spaces,
        )
        if self.decisions:
            self.sink.decoder.expect_decisions(self.decisions.hooks())
        if self.wanted.stacks:
            self.sink.decoder.stacks = UserStacks(self.layer.user_stack)

    def _start(self, child: targets.Target | None) -> None:
        self.layer.attach()
        self._write_limits(process_limits(self._pids, privileged=self.wanted.user in (None, "root")))
        if child:
            self.layer.expect(child.secret)
            child.release()
            self.layer.expect(0)
            self.say(f"tracing {self.wanted.command[0]} (PID {child.pid}) and its children; Ctrl-C goes to it")
        else:
            self._adopt_running()

    def _adopt_running(self) -> None:
        """Register what runs already and take a consistent first look at it."""
        if self.wanted.everything:
            self.layer.trace_all()
        for pid in self._pids:
            self.layer.trace_process(pid)
        rows = self.layer.snapshot()
        found = set((rows[:, 0] >> np.uint64(32)).tolist())
        for pid in self._pids:
            if pid not in found:
                raise no_such_process(pid)
        open_mms = {view.mm for view in split_views(rows) if view.pid != os.getpid()}
        for mm in open_mms:
            self.layer.register(mm)
        left = self._snapshot(open_mms, introduce=True)
        if left:
            self.say(f"warning: {len(left)} address spaces changed all the while: unknown until read again")
        who = "all processes" if self.wanted.everything else "PID " + " ".join(map(str, self._pids))
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
        """Among what the ring holds now: some of it may be newer than a view."""
        cells, heads = self.layer.ring.take()
        base = self.sink.records
        indices = [2 * (base + find_place(cells, heads, view.space, view.seq)) + 1 for view in views]
        self.sink.write_records(cells, heads)
        self.layer.ring.free()
        tables = snapshot_tables(views, indices, self.sink.cloak, introduce=introduce)
        self.sink.write(tables, size=sum(view.rows.nbytes for view in views))

    # ---- middle ----

    def _record(self, child: targets.Target | None) -> None:
        """Watch until the end. Once a command runs, a failure of ours is told, and nothing else."""
        try:
            self._loop(child)
            self._finish()
        except Exception as error:
            if not child:
                raise
            known = error if isinstance(error, VmatraceError) else None
            self.outcome.reason = "the recording failed"
            self.outcome.trouble.append(
                known or VmatraceError(f"recording: {type(error).__name__}: {error}", "what was written stays readable")
            )
            self.sink.writer.close()

    def _loop(self, child: targets.Target | None) -> None:
        began = time.monotonic()
        deadline = None if self.wanted.duration is None else began + self.wanted.duration
        poll = select.poll()
        if child:
            poll.register(child.pidfd, select.POLLIN)
        checked = began
        while self.sink.state == "writing":
            busy = self._drain()
            if child and child.status() is not None:
                self.outcome.reason = "the command ended"
                return
            now = time.monotonic()
            if not child and now - checked > 0.2:
                checked = now
                if not self.layer.registered():
                    self.outcome.reason = "all traced processes ended"
                    return
            if deadline is not None and now >= deadline:
                self.outcome.reason = "the duration is over"
                return
            if self._interrupts.asked():
                self.outcome.signal = self._interrupts.asked()
                self.outcome.reason = "interrupted"
                return
            self._tell()
            if not busy:
                poll.poll(POLL_S * 1000)
        self.outcome.reason = self.sink.reason

    def _tell(self) -> None:
        if self._interrupts.to_tell():
            self.say("waiting for the command; once more detaches and ends the recording")

    def _drain(self) -> bool:
        """Write what the ring holds each half second, or when it is a quarter full. True: come again at once."""
        now = time.monotonic_ns()
        full = self.layer.ring.waiting >= self._chunk
        if full or now - self._flushed >= FLUSH_NS:
            self._flush()
        if now - self._flushed >= FLUSH_NS:
            self._flushed = now
            self._watch()
        return full

    def _flush(self, until: int | None = None) -> int:
        """Write a chunk of records, whose room in the ring is free afterwards; return how many cells that were."""
        self.sink.write_records(*self.layer.ring.take(self._chunk), until)
        return self.layer.ring.free()

    def _watch(self) -> None:
        """Twice a second: losses, changed sysctls."""
        lost = sum(self.layer.counts()["lost"]) + self.sink.decoder.dropped
        if lost > self._lost_seen:
            self._note_loss(lost - self._lost_seen)
            self._lost_seen = lost
            self._snapshot(None, introduce=False)
        self._write_limits([])

    def _note_loss(self, lost: int) -> None:
        self.sink.write(
            {"losses": {"index": [2 * self.sink.records + 1], "time": [time.monotonic_ns()], "lost": [lost]}}
        )

    def _write_limits(self, rows: list[tuple[int, str, int]]) -> None:
        """The given limits, and sysctls at the start and when they change."""
        rows = self._sysctls.changed() + rows
        if rows:
            many = len(rows)
            self.sink.write(
                {
                    "limits": {
                        "index": np.full(many, 2 * self.sink.records + 1),
                        "time": np.full(many, time.monotonic_ns()),
                        "pid": [row[0] for row in rows],
                        "name": [row[1] for row in rows],
                        "value": np.array([row[2] for row in rows], dtype=np.uint64),
                    }
                }
            )

    # ---- end ----

    def _finish(self) -> None:
        """Last look at what lives on, then detach, drain and close the file."""
        alive: set[int] = set()
        if self.layer.registered():
            with contextlib.suppress(CannotTrace):
                if self.sink.state == "writing":
                    self._snapshot(None, introduce=False)
                rows = self.layer.snapshot()
                alive = set((rows[rows[:, 2] != 0, 0] >> np.uint64(32)).tolist())
        # One moment ends the recording. Hooks go one after the other, and would see halves of operations meanwhile.
        known, ended, missed = dict(self.layer.space_seqs()), time.monotonic_ns(), 0
        self.layer.detach()
        # Those born since the first look are alive too, with no count that could prove a loss.
        spaces = {**dict.fromkeys((space for space, _ in self.layer.space_seqs()), 0), **known}
        if self.decisions:
            self.layer.forget()
            missed = self.decisions.misses()
            self.decisions.close()
        counts = self.layer.counts()
        if no_room := sum(counts["no_space"]):
            self.outcome.trouble.append(
                VmatraceError(f"{no_room} address spaces found no room and were not traced", "trace fewer processes")
            )
        while self._flush(ended):
            pass
        if (stacks := self.sink.decoder.stacks) and stacks.lost:
            self.outcome.trouble.append(VmatraceError(f"{stacks.lost} calls are without their stack: no room for it"))
        lost = sum(counts["lost"]) + self.sink.decoder.dropped + missed
        if lost > self._lost_seen:
            self._note_loss(lost - self._lost_seen)
        self.outcome.alive = tuple(sorted(alive))
        self.outcome.records = self.sink.records
        self.outcome.lost = lost
        end: dict[str, Any] = {
            "reason": self.outcome.reason,
            "records": self.outcome.records,
            "lost": lost,
            "spaces": list(spaces),
            "space_seq": list(spaces.values()),
            "alive": list(self.outcome.alive),
        }
        self.sink.finish(end, counts["records"])
        self.outcome.trouble += self.sink.trouble
        self.outcome.written = self.sink.writer.bytes_written
        self.outcome.cpu_ns = time.process_time_ns()

    def _wait(self, child: targets.Target) -> None:
        """The recording may be over before the command is: its status is still ours to pass on."""
        while (status := child.status()) is None:
            if self._interrupts.asked():
                self.outcome.signal = self._interrupts.asked()
                return
            self._tell()
            time.sleep(0.02)
        self.outcome.status = status


def record(wanted: Wanted, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Record as ``wanted``; ``say`` gets progress lines. Raises `VmatraceError` when nothing was recorded."""
    if sum((bool(wanted.command), bool(wanted.pids), wanted.everything)) != 1:
        raise UsageError("record: wants one of -- CMD, -p PID, --all", "see `vmatrace record --help`")
    return Session(wanted, say).run()
