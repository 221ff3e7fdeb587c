"""What tracing costs the traced process: rounds of each tracer in turn, the least time of each counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import bpfstats
from tests.bench.processes import TRACERS, Storm, available, start_recorder

# The slow tracers do fewer operations a round: ns per operation is what is compared.
AMOUNTS = {"untraced": 200_000, "vmatrace": 200_000, "strace": 5_000, "bpftrace": 20_000}
WHATS = ("mprotect", "pair", "middle", "flip")
# An untraced operation's own time, as bars: added time at most so many times of it.
BARS = {"mprotect": (3.0, 2.0), "pair": (1.5, 1.0)}
# A program that runs once a record belongs to the layer whose name its own contains.
LAYERS = (
    ("system calls", ("sys_",)),
    ("states under the lock", ("lock", "walk", "unmapped_area", "vm_unmapped")),
    ("second evidence", ("ma_write", "kmem", "cache", "alloc", "free", "store")),
)


@dataclass(frozen=True, slots=True)
class Overhead:
    """ns per operation: ``least[tracer][what]`` over all rounds, and how many rounds each had."""

    least: dict[str, dict[str, float]]
    rounds: int

    def added(self, tracer: str, what: str) -> float:
        """ns that a tracer adds to one operation."""
        return self.least[tracer][what] - self.least["untraced"][what]


def measure(program: Path, directory: Path, rounds: int, whats: Sequence[str] = WHATS) -> Overhead:
    """Rounds interleaved: each tracer once a round, detached before the next begins."""
    tracers = [name for name in TRACERS if available(name)]
    least: dict[str, dict[str, float]] = {name: {} for name in tracers}
    for _ in range(rounds):
        for name in tracers:
            for what, ns in _round(program, directory, name, whats).items():
                least[name][what] = min(ns, least[name].get(what, ns))
    return Overhead(least, rounds)


def _round(program: Path, directory: Path, tracer: str, whats: Sequence[str]) -> dict[str, float]:
    """One tracer on all storms at once; they run one after the other."""
    storms = [Storm(program, what, AMOUNTS[tracer], rounds=3) for what in whats]
    times: dict[str, float] = {}
    with TRACERS[tracer]([storm.pid for storm in storms], directory):
        for storm in storms:
            # The first round of each warms up its page tables, its branch predictors and the tracer.
            times[storm.what] = min(storm.go()["ns_per_op"] for _ in range(2))
    for storm in storms:
        storm.end()
    return times


def program_costs(program: Path, directory: Path, what: str, amount: int) -> list[tuple[str, float, float]]:
    """By BPF program: name, ns a run, ns an operation; from the kernel's statistics, dearest first."""
    before = set(bpfstats.programs())
    storm = Storm(program, what, amount, rounds=2)
    recorder = start_recorder(directory / "stats.vmat", ["-p", str(storm.pid)])
    with bpfstats.enabled():
        base = bpfstats.programs()
        storm.go()
        after = bpfstats.programs()
    time.sleep(0.05)
    storm.end()
    recorder.finish()
    costs = []
    for number, cost in after.items():
        runs = cost.runs - base[number].runs if number in base else cost.runs
        spent = cost.run_ns - base[number].run_ns if number in base else cost.run_ns
        if number not in before and runs:
            costs.append((cost.name, spent / runs, spent / amount))
    return sorted(costs, key=lambda row: -row[2])


def layer_of(name: str) -> str:
    """The layer that a BPF program belongs to, by its name."""
    for layer, words in LAYERS:
        if any(word in name for word in words):
            return layer
    return "other"
