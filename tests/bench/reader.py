"""What recording costs the machine: time to attach, CPU of the reader, bytes, losses, bystanders."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.processes import VMATRACE, Recorder, Storm, start_recorder


@dataclass(frozen=True, slots=True)
class Reading:
    """One recorded storm; ``calls`` counts system calls (a pair is two). ``lost`` None: not said."""

    calls: int
    cpu_ns_per_call: float
    bytes_per_call: float
    lost: int | None
    seconds: float


def attach_seconds(directory: Path, tries: int) -> tuple[float, float]:
    """The least time from start to "tracing", and how much of it is Python importing the package."""
    times = []
    for _ in range(tries):
        recorder = start_recorder(directory / "attach.vmat", ["--", "sleep", "0.3"])
        times.append(recorder.ready_s)
        recorder.finish()
    before = time.monotonic()
    subprocess.run([VMATRACE, "record", "--help"], capture_output=True, check=False)
    return min(times), time.monotonic() - before


def btf_seconds(directory: Path) -> tuple[float, float]:
    """Time to read the kernel's BTF without an index of it, and with the one that this leaves behind."""
    script = (
        "import time; from vmatrace import btf; begin = time.perf_counter()\n"
        "btf.load().offset('vm_area_struct.vm_end'); print(time.perf_counter() - begin)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
    times = [
        float(subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    return times[0], times[1]


def lost_records(recorder: Recorder) -> int | None:
    """Lost records as the recorder's last words have them; None if they say nothing of it."""
    for line in reversed(recorder.said):
        found = re.search(r"(\d[\d,]*) (?:records? )?lost", line)
        if found:
            return int(found.group(1).replace(",", ""))
    return None


def record_storm(program: Path, directory: Path, what: str, amount: int) -> Reading:
    """Record one storm with the trace on disk; the file is left as ``reading.vmat``."""
    storm = Storm(program, what, amount)
    recorder = start_recorder(directory / "reading.vmat", ["-p", str(storm.pid)])
    result = storm.go()
    storm.end()
    recorder.finish()
    calls = result["mprotect"] + 2 * result["pair"]
    return Reading(calls, recorder.cpu / calls * 1e9, recorder.size / calls, lost_records(recorder), result["ns"] / 1e9)


def bystanders(program: Path, directory: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Least ns per operation of untraced storms: nobody records, `-p` of another, `-- CMD` of another."""
    least: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for mode in ("nobody", "-p", "-- CMD"):
            for what, ns in _bystand(program, directory, mode).items():
                row = least.setdefault(mode, {})
                row[what] = min(ns, row.get(what, ns))
    return least


def _bystand(program: Path, directory: Path, mode: str) -> dict[str, float]:
    storms = [Storm(program, "getppid", 1_000_000), Storm(program, "pair", 100_000)]
    idle = subprocess.Popen(["sleep", "60"])
    recorder = None
    if mode == "-p":
        recorder = start_recorder(directory / "idle.vmat", ["-p", str(idle.pid)])
    elif mode == "-- CMD":
        recorder = start_recorder(directory / "idle.vmat", ["--", "sleep", "60"])
    times = {storm.what: storm.go()["ns_per_op"] for storm in storms}
    for storm in storms:
        storm.end()
    idle.kill()
    idle.wait()
    if recorder is not None:
        # Twice: with -- CMD the first waits for the command.
        for _ in range(2):
            if recorder.process.poll() is None:
                recorder.process.send_signal(signal.SIGINT)
                time.sleep(0.05)
        recorder.finish()
    return times
