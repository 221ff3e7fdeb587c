"""The kernels of the matrix, one guest run on each, and the page of results that the run itself writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.workloads.build import FLAGS
from tests.workloads.build import HERE as WORKLOADS
from tests.workloads.oracle import difference, from_timeline, read_maps
from vmatrace.tracefile import TraceFile

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "matrix.md"
VMATRACE = Path(sys.executable).with_name("vmatrace")
PROGRAMS = ("vmafuzz", "exec_chain", "fork_counts", "stack_growth", "maxmap")
COMPILERS = {"x86_64": "gcc", "arm64": "aarch64-linux-gnu-gcc"}
BROUGHT = (
    "all.vmat",
    "*.maps",
    "*.pid",
    "*.err",
    "*.out",
    "status",
    "release",
    "fingerprint.json",
    "maxmap.json",
)
TIMEOUT_S = 600
# Results of several runs (one kernel each, say) meet here; a folder of the user's, not of the tree.
RESULTS = Path(
    os.environ.get("VMATRACE_MATRIX_RESULTS", Path(tempfile.gettempdir()) / f"vmatrace-matrix-{os.getuid()}")
)
OPERATIONS = int(os.environ.get("VMATRACE_MATRIX_OPERATIONS", "20000"))


_INTRODUCTION = """# Kernels that were run

Written by the run itself: by `make test-vm`, which boots each kernel in a guest (`vmatrace lab`) and records a
random workload and the corners (overlayfs, memfd_secret, a cut hugetlb mapping, exec, fork, a growing stack, the
limit of the number of maps) there; or by `python -m tests.vm.golden`, which records the small golden traces.
Each trace was replayed with the rules that it names (`auto`), and its last layouts compared with the kernel's own
`/proc/PID/maps`. *Undecided*: in brackets those that changed a VMA. *Signs*: features told by behaviour against
those told by BTF. *Decisions*: how functions were probed, and what was seen of them: merges asked and refused, cuts,
calls of mmap_prepare; each has a verdict of its own, and the merges and cuts are those of the operations, except
where what is *missing* says so. *s*: seconds of the whole guest run, emulated, on a busy machine with two processors.

| kernel | release | ops | passed | FAILED | undecided | lost | layouts | rules | signs | decisions | corners | s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel of the matrix."""

    arch: str
    version: str
    flavour: str = "cloud"

    def __str__(self) -> str:
        return f"{self.arch}-{self.version}" + ("" if self.flavour == "cloud" else f"-{self.flavour}")


MATRIX = (
    *(
        Entry("x86_64", version)
        for version in ("6.1", "6.12", "6.16", "6.17", "6.18", "6.19", "7.0", "7.1", "7.2", "7.3")
    ),
    *(Entry("arm64", version) for version in ("6.12", "6.16", "6.18", "7.3")),
    Entry("arm64", "7.3", "16k"),
)


@dataclass(slots=True)
class Outcome:
    """What one guest gave, as it stands in the page of results."""

    entry: str
    release: str = ""
    seconds: float = 0.0
    operations: int = 0
    passed: int = 0
    failed: int = 0
    undecided: int = 0
    changing_open: int = 0
    lost: int = 0
    layouts: str = ""
    rule_set: str = ""
    disagreements: str = ""
    decisions: str = ""
    corners: str = ""


def build(arch: str, into: Path, programs: tuple[str, ...] = PROGRAMS) -> list[Path]:
    """Compile the workloads for ``arch``, static: the guest needs none of this machine's libraries."""
    into.mkdir(parents=True, exist_ok=True)
    built = []
    for source in [*(WORKLOADS / f"{name}.c" for name in programs), HERE / "corners.c"]:
        target = into / source.stem
        command = [COMPILERS[arch], *FLAGS, "-static", "-pthread", "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.append(target)
    return built


def run(entry: Entry, programs: list[Path], into: Path, operations: int) -> subprocess.CompletedProcess[str]:
    """Record the workloads in a guest; what it made lies in ``into`` afterwards."""
    words: list[str | Path] = [VMATRACE, "lab", "run", "--kernel", entry.version, "--arch", entry.arch]
    words += [
        "--flavour",
        entry.flavour,
        "--timeout",
        str(TIMEOUT_S),
        "--into",
        into,
        "--put",
        HERE / "guest.sh",
    ]
    for program in programs:
        words += ["--put", program]
    for pattern in BROUGHT:
        words += ["--get", pattern]
    return subprocess.run(
        [*words, "--", "sh", "guest.sh", str(operations)], capture_output=True, text=True, check=False
    )


def vmatrace_json(*words: str | Path) -> dict[str, Any]:
    """What a command of vmatrace prints as JSON."""
    done = subprocess.run([VMATRACE, *words, "--format", "json"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(outcome: Outcome, trace: Path, dumps: Mapping[Path, str | None]) -> list[str]:
    """Replay the trace and compare the last layouts with ``dumps`` (of which process; None: the first).

    Fills ``outcome``; returns what is wrong.
    """
    answer = vmatrace_json("replay", trace)
    for name in ("operations", "passed", "failed", "undecided", "changing_open"):
        setattr(outcome, name, answer[name])
    outcome.lost = answer["lost_records"]
    problems = [found["text"] for found in answer["divergences"][:5]]
    if not answer["trace"]["complete"] or outcome.lost:
        problems.append(f"{outcome.lost} records lost")
    if "decisions" in answer["trace"]["layers"]:
        problems += decision_problems(answer)
        outcome.decisions = describe_decisions(answer["decisions"], TraceFile(trace).header["decisions"])
    equal = 0
    for dump, pid in dumps.items():
        end = vmatrace_json("timeline", trace, "--at", "end", *(("--pid", pid) if pid else ()))
        due, got = read_maps(dump), from_timeline(end["vmas"], answer["trace"]["page_size"])
        equal += got == due
        if got != due:
            problems.append(f"{dump.name}: not the timeline's end:\n{difference(due, got)}")
    outcome.layouts = f"{equal} of {len(dumps)} equal"
    return problems


def decision_problems(answer: dict[str, Any]) -> list[str]:
    """What is wrong with the decisions of a replayed trace, given its JSON: each right, and none unseen."""
    decisions, effects = answer["decisions"], answer["effects"]
    found = [f"{decisions['failed']} decisions failed"] if decisions["failed"] else []
    if decisions["split"] != effects["split"]:
        found.append(f"{decisions['split']} cuts decided, {effects['split']} seen")
    merged = decisions["merge_attempt"] - decisions["merge_refused"]
    blind = any("no probe sees" in reason for reason in decisions["undecided_reasons"])
    if merged > effects["merge"] or (merged < effects["merge"] and not blind):
        found.append(f"{merged} merges decided, {effects['merge']} seen")
    return found


def describe_decisions(decisions: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """The decisions of a trace as the page of results says them."""
    counts = {name: f"{decisions[name]:,}" for name in ("merge_attempt", "merge_refused", "split", "mmap_prepare")}
    missing = [gap["function"] for gap in header["missing"]]
    text = "{merge_attempt} merges asked, {merge_refused} refused, {split} cuts, {mmap_prepare} hooks".format(**counts)
    return f"{header['how']}: {text}" + (f"; missing {', '.join(missing)}" if missing else "")


def describe(entry: Entry, fingerprint: Path, stderr: str) -> Outcome:
    """What is known of a run before its trace is read. ``stderr``: what `vmatrace lab run` said."""
    found = json.loads(fingerprint.read_text())
    seconds = re.search(r"([\d.]+) s in all", stderr)
    return Outcome(
        str(entry),
        found["kernel"],
        float(seconds[1]) if seconds else 0.0,
        rule_set=found["rule_set"],
        disagreements=" ".join(found["disagreements"]),
    )


def keep(outcome: Outcome) -> None:
    """Put one result where those of the whole matrix are, whichever run made them, and write the page again."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{outcome.entry}.json").write_text(json.dumps(asdict(outcome)))
    write_page(RESULTS)


def write_page(folder: Path, page: Path = PAGE) -> None:
    """Write the table of results; a kernel without one says so."""
    rows = []
    for entry in MATRIX:
        file = folder / f"{entry}.json"
        if not file.exists():
            rows.append(f"| {entry} | not run |" + " |" * 11)
            continue
        found = Outcome(**json.loads(file.read_text()))
        verdicts = f"{found.passed:,} | {found.failed} | {found.undecided} ({found.changing_open})"
        signs = found.disagreements or "agree"
        rows.append(
            f"| {entry} | {found.release} | {found.operations:,} | {verdicts} | {found.lost} "
            f"| {found.layouts} | {found.rule_set} | {signs} | {found.decisions} | {found.corners} "
            f"| {found.seconds:.0f} |"
        )
    page.write_text(_INTRODUCTION + "\n".join(rows) + "\n")
