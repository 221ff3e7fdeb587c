"""How quickly a trace is read again: ingest and timeline, operations a second and memory an operation."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# In a process of its own: peak memory must be that of reading this trace alone.
_SCRIPT = """
import json, resource, sys, time
import vmatrace
import pyarrow, numpy, pandas
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
trace = vmatrace.open(sys.argv[1])
timeline = trace.timeline(int(sys.argv[2]) if len(sys.argv) > 2 else None)
timeline.at("end")
middle = time.perf_counter()
listed = trace.operations()
count = len(listed) if hasattr(listed, "__len__") else sum(1 for _ in listed)
ended = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"count": count, "seconds": middle - begun, "listing": ended - middle,
                  "bytes": (peak - base) * 1024}))
"""


@dataclass(frozen=True, slots=True)
class Offline:
    """Reading one trace: ``seconds`` to open it and have its timeline's last state."""

    operations: int
    seconds: float
    peak_bytes: int


def read_trace(path: Path) -> Offline | str:
    """Read a trace in a fresh interpreter; a string says why that did not work."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(path)], capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    found = json.loads(done.stdout)
    return Offline(found["count"], found["seconds"], found["bytes"])
