"""Runs inside a guest: what each layer adds to an operation, by trampoline and by kprobe, printed side by side.

``python3 cost.py [ROUND]``, with the workload ``storm`` beside it; ROUND operations a round, the least round counts.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

from vmatrace.capture.decisions import Way
from vmatrace.capture.session import record
from vmatrace.capture.wanted import Wanted
from vmatrace.tracefile import TraceFile

WHATS = ("mprotect", "middle", "pair", "flip", "getppid")
ROUNDS = 40  # short ones: the least of many is free of what else the host does
RING = 64 << 20  # the reader is emulated too, and shall lose nothing
MODES: tuple[tuple[str, str, tuple[Way, ...]], ...] = (
    ("operations", "operations", ()),
    ("+ decisions, fentry", "decisions", ("fentry",)),
    ("+ decisions, kprobe", "decisions", ("kprobe",)),
)


def storm_command(many: int, out: Path) -> tuple[str, ...]:
    """All storms one after the other, their answers in ``out``."""
    storms = "; ".join(f"./storm {what} {many} --rounds {ROUNDS}" for what in WHATS)
    return "sh", "-c", f"({storms}) >{out}"


def least(out: Path) -> dict[str, float]:
    """ns per operation of each storm, the least round."""
    found: dict[str, float] = {}
    for line in out.read_text().splitlines():
        answer = json.loads(line)
        found[answer["what"]] = min(answer["ns_per_op"], found.get(answer["what"], answer["ns_per_op"]))
    return found


def main(many: int) -> int:
    """Print ns per operation: untraced, then what each way of tracing makes of it."""
    out = Path("storm.out")
    columns = {"untraced": untraced(many, out)}
    for name, layer, ways in MODES:
        outcome = record(
            Wanted(
                Path("cost.vmat"), command=storm_command(many, out), force=True, layer=layer, ways=ways, ring_bytes=RING
            )
        )
        probes = TraceFile("cost.vmat").header.get("decisions", {})
        missing = [entry["function"] for entry in probes.get("missing", ())]
        print(
            f"{name}: {outcome.records} records, {outcome.lost} lost, {len(probes.get('probes', ()))} functions,"
            f" missing {missing}",
            flush=True,
        )
        columns[name] = least(out)
    print(f"ns per operation, {platform.release()} {platform.machine()}, emulated: compare within this table only")
    print("| operation | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for what in WHATS:
        print(f"| {what} | " + " | ".join(f"{column[what]:,.0f}" for column in columns.values()) + " |")
    return 0


def untraced(many: int, out: Path) -> dict[str, float]:
    """The storms with nothing attached."""
    subprocess.run(storm_command(many, out), check=True)
    return least(out)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
