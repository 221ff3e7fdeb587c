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
import numpy, pyarrow
from vmatrace.ingest import Trace
from vmatrace.timeline import timelines
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
trace = Trace(sys.argv[1])
timelines(trace)[-1].at_end()
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"count": len(trace.operations), "seconds": seconds, "bytes": (peak - base) * 1024}))
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
