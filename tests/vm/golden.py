"""Records the golden corpus: on each kernel of the matrix one small trace, kept with the dump of its final layout.

``python -m tests.vm.golden [ENTRY ...]`` writes tests/data/golden; `make test` replays it where no kernel boots.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm.matrix import MATRIX, VMATRACE, Entry, build, describe, judge, keep

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
LARGEST = 200_000
# Ends in an exact dump of its maps; children show what fork makes of them.
WORKLOAD = ("./vmafuzz", "7", "450", "--children", "4", "-o", "/job/end.maps")


def record(entry: Entry, into: Path) -> None:
    """Record on one kernel and keep trace and dump, or raise with what went wrong."""
    programs = build(entry.arch, into / "programs")
    fuzz = next(program for program in programs if program.name == WORKLOAD[0].removeprefix("./"))
    words: list[str | Path] = [VMATRACE, "lab", "run", "--kernel", entry.version, "--arch", entry.arch]
    words += ["--flavour", entry.flavour, "--into", into, "--put", fuzz]
    for name in ("trace.vmat", "end.maps", "fingerprint.json"):
        words += ["--get", name]
    script = (
        f"vmatrace record -q --layer operations -o trace.vmat -- {' '.join(WORKLOAD)} "
        "&& vmatrace fingerprint --format json >fingerprint.json"
    )
    done = subprocess.run([*words, "--", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{entry}: exit status {done.returncode}\n{done.stderr}")
    size = (into / "trace.vmat").stat().st_size
    if size >= LARGEST:
        raise RuntimeError(f"{entry}: {size} bytes; record fewer operations")
    outcome = describe(entry, into / "fingerprint.json", done.stderr)
    problems = judge(outcome, into / "trace.vmat", {into / "end.maps": None})
    keep(outcome)
    if problems:
        raise RuntimeError(f"{entry}: " + "\n".join(problems))
    GOLDEN.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(into / "trace.vmat", GOLDEN / f"{entry}.vmat")
    shutil.copyfile(into / "end.maps", GOLDEN / f"{entry}.maps")
    print(f"{entry}: {size} bytes", flush=True)


def main(names: list[str]) -> int:
    """Record the named entries, or all; exit status 1 if one of them failed."""
    failed = 0
    for entry in MATRIX:
        if names and str(entry) not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="vmatrace-golden-") as folder:
            try:
                record(entry, Path(folder))
            except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
                print(error, file=sys.stderr, flush=True)
                failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
