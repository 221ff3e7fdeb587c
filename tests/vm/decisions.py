"""Both layers on each family of kernels: programs that count prove that nothing is missed; small traces are kept.

``python -m tests.vm.decisions [ENTRY ...]`` writes tests/data/decisions; `make test` replays it where no kernel boots.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.vm.matrix import (
    HERE,
    RESULTS,
    VMATRACE,
    Entry,
    Outcome,
    build,
    decision_problems,
    describe_decisions,
    keep,
    vmatrace_json,
)
from vmatrace.tracefile import TraceFile

KEPT = HERE.parent / "data" / "decisions"
LARGEST = 150_000
PROGRAMS = ("vmafuzz", "splits", "merges", "mremap_counts", "fork_counts", "stack_growth", "exec_chain")
FAMILIES = (
    *(Entry("x86_64", version) for version in ("6.1", "6.12", "6.16", "6.18", "7.1", "7.3")),
    *(Entry("arm64", version) for version in ("6.18", "7.3")),
)


def run(entry: Entry, into: Path) -> None:
    """Record both traces in a guest, or raise with what went wrong."""
    words: list[str | Path] = [VMATRACE, "lab", "run", "--kernel", entry.version, "--arch", entry.arch]
    words += ["--flavour", entry.flavour, "--timeout", "1500", "--into", into, "--put", HERE / "decisions.sh"]
    for program in build(entry.arch, into / "programs", PROGRAMS):
        words += ["--put", program]
    for name in ("*.vmat", "status"):
        words += ["--get", name]
    done = subprocess.run([*words, "--", "sh", "decisions.sh"], capture_output=True, text=True, check=False)
    status = (into / "status").read_text() if (into / "status").exists() else ""
    if done.returncode != 0 or status != "counted 0\nsmall 0\n":
        raise RuntimeError(f"{entry}: exit status {done.returncode}, {status!r}\n{done.stdout}{done.stderr}")


def problems(answer: dict[str, Any]) -> list[str]:
    """What is wrong with a replayed trace: ``answer`` is its JSON."""
    found = [each["text"] for each in answer["divergences"][:5]]
    if answer["lost_records"] or not answer["trace"]["complete"]:
        found.append(f"{answer['lost_records']} records lost")
    return found + decision_problems(answer)


def pack(source: Path, target: Path) -> None:
    """The same trace in one piece, tightly compressed: as a recording cannot write it."""
    with pa.ipc.open_stream(source) as stream:
        batches, schema = list(stream), stream.schema
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=19))
    with pa.ipc.new_stream(str(target), schema, options=options) as out:
        for batch in batches:
            out.write_batch(batch)


def amend(entry: Entry, decisions: str) -> None:
    """Put what was seen of the decisions into the page of results, beside what the matrix found."""
    known = RESULTS / f"{entry}.json"
    outcome = Outcome(**json.loads(known.read_text())) if known.exists() else Outcome(str(entry))
    outcome.decisions = decisions
    keep(outcome)


def record(entry: Entry, into: Path) -> list[str]:
    """Record on one kernel, judge both traces and keep the small one; what is wrong, if anything."""
    run(entry, into)
    found = []
    for name in ("counted", "small"):
        answer = vmatrace_json("replay", into / f"{name}.vmat")
        found += [f"{entry} {name}: {problem}" for problem in problems(answer)]
        effects = {key: answer["effects"][key] for key in ("merge", "split")}
        print(f"{entry} {name}: decisions {answer['decisions']}, effects {effects}", flush=True)
        if name == "counted":
            amend(entry, describe_decisions(answer["decisions"], TraceFile(into / "counted.vmat").header["decisions"]))
    packed = into / f"{entry}.vmat"
    pack(into / "small.vmat", packed)
    size = packed.stat().st_size
    if size >= LARGEST:
        found.append(f"{entry}: {size} bytes; record fewer calls")
    if not found:
        shutil.copyfile(packed, KEPT / packed.name)
        print(f"{entry}: {size} bytes kept", flush=True)
    return found


def main(names: list[str]) -> int:
    """Record the named entries, or all; exit status 1 if something is wrong with one of them."""
    failed = 0
    for entry in FAMILIES:
        if names and str(entry) not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="vmatrace-decisions-") as folder:
            try:
                wrong = record(entry, Path(folder))
            except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
                wrong = [str(error)]
        for text in wrong:
            print(text, file=sys.stderr, flush=True)
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
