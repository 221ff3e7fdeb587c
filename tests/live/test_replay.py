"""What ordinary programs do, recorded on this kernel, has 0 failed verdicts; an altered record has one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.recording import VMATRACE, assert_conforms, record
from tests.replay.altering import Alterable, other_value
from tests.workloads.build import build
from vmatrace.replay import PASSED

_PROGRAMS = {
    "numpy": (sys.executable, "-c", "import numpy; numpy.ones((300, 300)).sum()"),
    "forks": ("sh", "-c", "for i in $(seq 100); do (exit 0); done"),
    "compiler": ("cc", "-O1", "-c", "-o", "/dev/null", "{workload}"),
    "node": ("node", "-e", "new (require('worker_threads').Worker)('0', {eval: true})"),
    "threads": (
        sys.executable,
        "-c",
        "import threading as t; x = [t.Thread(target=bytearray, args=(1 << 22,)) for i in range(40)];"
        "[i.start() for i in x]; [i.join() for i in x]",
    ),
}
_WORKLOAD = Path(__file__).resolve().parents[1] / "workloads" / "merges.c"


@pytest.mark.parametrize("name", sorted(_PROGRAMS))
def test_ordinary_programs_conform(name: str, tmp_path: Path) -> None:
    words = [word.replace("{workload}", str(_WORKLOAD)) for word in _PROGRAMS[name]]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    recorded = record(tmp_path / "t.vmat", *words)
    assert recorded.status == 0, recorded.stderr
    answer = recorded.replay()
    assert_conforms(answer)
    assert answer["passed"] > 40


def test_what_a_ring_too_small_loses_proves_no_divergence(tmp_path: Path) -> None:
    fuzz = build(["vmafuzz"])["vmafuzz"]
    words = (fuzz, "7", "3000", "--ops", "all,fork=30")
    recorded = record(tmp_path / "t.vmat", *words, options=("--buffer", "64K"))
    answer = recorded.replay()
    assert answer["lost_records"]
    assert answer["failed"] == 0, json.dumps(answer["divergences"][:5], indent=1)
    assert answer["undecided"]
    assert answer["passed"] > answer["undecided"]


# A thousand VMAs between two free places: the one above them, too large for the lower one, takes the segment.
_ATTACH_ABOVE = """
import ctypes, ctypes.util
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
page = 4096
top = libc.mmap(None, 64 * page, 3, 0x22, -1, 0)
low = libc.mmap(None, 2000 * page, 3, 0x22, -1, 0)
for number in range(0, 2000, 2):
    assert libc.mprotect(ctypes.c_void_p(low + number * page), page, 1) == 0
assert libc.munmap(ctypes.c_void_p(top), 64 * page) == 0
segment = libc.shmget(0, 48 * page, 0o600)
placed = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
assert placed > low, (hex(placed), hex(low))
"""


def test_a_segment_above_a_thousand_maps_is_judged(tmp_path: Path) -> None:
    recorded = record(tmp_path / "t.vmat", sys.executable, "-c", _ATTACH_ABOVE)
    assert recorded.status == 0, recorded.stderr
    answer = recorded.replay()
    assert answer["failed"] == 0, json.dumps(answer["divergences"], indent=1)
    assert answer["by_syscall"]["shmat"]["passed"] == 1


def test_the_rules_of_another_kernel_are_refuted(tmp_path: Path) -> None:
    program = "import mmap; x = [mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE) for i in range(9)]; del x[::2]"
    recorded = record(tmp_path / "t.vmat", sys.executable, "-c", program)
    words = [VMATRACE, "replay", recorded.path, "--rules", "6.1", "--format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["divergences"]


def test_an_altered_record_is_named(tmp_path: Path) -> None:
    recorded = record(tmp_path / "t.vmat", "/bin/true")
    trace = Alterable(recorded.path)
    passed = {(v.space, v.op) for v in trace.result if v.verdict == PASSED}
    for name in ("sections.map_count", "sections.after.end", "sections.evidence.object", "calls.result"):
        place = next(p for p in trace.places("predicted") if p.name == name and trace.operation_of(p) in passed)
        result = trace.altered(place, other_value(place, trace.value(place)), tmp_path / "altered.vmat")
        assert result.status() == 1
        assert (result.failed[0].space, result.failed[0].op) == trace.operation_of(place)
