"""Every kernel of the matrix, booted in a guest: it records there, and conforms to its rules here."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.vm.matrix import (
    COMPILERS,
    MATRIX,
    OPERATIONS,
    Entry,
    Outcome,
    build,
    keep,
    run,
    vmatrace_json,
    write_page,
)
from tests.workloads.oracle import difference, from_timeline, read_maps

# Results of several runs (one kernel each, say) meet here; a folder of the user's, not of the tree.
RESULTS = Path(
    os.environ.get("VMATRACE_MATRIX_RESULTS", Path(tempfile.gettempdir()) / f"vmatrace-matrix-{os.getuid()}")
)
DUMPED = ("vmafuzz", "corners")


@functools.cache
def programs(arch: str) -> list[Path]:
    return build(arch, Path(tempfile.mkdtemp(prefix=f"vmatrace-{arch}-")))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("entry", MATRIX, ids=str)
def test_kernel(entry: Entry, tmp_path: Path) -> None:
    if shutil.which(COMPILERS[entry.arch]) is None:
        pytest.skip(f"no compiler for {entry.arch}: install gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    done = run(entry, programs(entry.arch), tmp_path, OPERATIONS)
    assert done.returncode == 0, done.stderr
    status = (tmp_path / "status").read_text()
    assert status == "record 0\nfingerprint 0\n", status + (tmp_path / "record.err").read_text()

    outcome = Outcome(str(entry), (tmp_path / "release").read_text().strip())
    if match := re.search(r"([\d.]+) s in all", done.stderr):
        outcome.seconds = float(match[1])
    outcome.corners = "; ".join((tmp_path / "corners.out").read_text().splitlines())
    fingerprint = json.loads((tmp_path / "fingerprint.json").read_text())
    outcome.rule_set = fingerprint["rule_set"]
    outcome.disagreements = " ".join(fingerprint["disagreements"])
    try:
        problems = judge(tmp_path, outcome)
    finally:
        keep(outcome, RESULTS)
        write_page(RESULTS)
    assert not problems, "\n".join(problems)
    assert not fingerprint["disagreements"]


def judge(folder: Path, outcome: Outcome) -> list[str]:
    """Replay the trace and compare the layouts; fill ``outcome``, return what is wrong."""
    trace = folder / "all.vmat"
    answer = vmatrace_json("replay", trace)
    for name in ("operations", "passed", "failed", "undecided", "changing_open"):
        setattr(outcome, name, answer[name])
    outcome.lost = answer["lost_records"]
    problems = [text["text"] for text in answer["divergences"][:5]]
    if not answer["trace"]["complete"] or outcome.lost:
        problems.append(f"{outcome.lost} records lost")
    equal = 0
    for name in DUMPED:
        due = read_maps(folder / f"{name}.maps")
        pid = (folder / f"{name}.pid").read_text().strip()
        end = vmatrace_json("timeline", trace, "--at", "end", "--pid", pid)
        got = from_timeline(end["vmas"], answer["trace"]["page_size"])
        if got == due:
            equal += 1
        else:
            problems.append(f"{name}: the timeline's end is not its dump:\n{difference(due, got)}")
    outcome.layouts = f"{equal} of {len(DUMPED)} equal"
    return problems
