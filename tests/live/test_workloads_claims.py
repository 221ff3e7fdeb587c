"""What the workloads say of themselves, held against the kernel without any tracing of ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.workloads.build import COUNTED, build


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return build()


@pytest.mark.parametrize("name", COUNTED)
def test_the_tally_agrees_with_the_number_of_vmas_at_every_step(name: str, programs: dict[str, Path]) -> None:
    done = subprocess.run([programs[name], "--check", "--expect"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["workload"] == name


@pytest.mark.parametrize(
    ("name", "effect", "count"),
    [
        ("splits", "split", 23 + 29 + 19 + 13),
        ("merges", "merge", 2 * (31 + 37 + 41)),
        ("merges", "victims", 41 + 2 * 41 + 1 + 1),
        ("fork_counts", "split", 17 * 7),
        ("fork_counts", "merge", 17 * 3),
        ("mremap_counts", "copy", 31 + 13 + 7 + 5),
        ("mremap_counts", "grow", 29 + 3),
        ("mremap_counts", "merge", 29 + 3 + 11),
        ("brk_growth", "grow", 42),
        ("stack_growth", "stack", 47 + 131),
        ("threads", "split", 2 * 7 * 101),
        ("clone_vm", "merge", 5 * 53),
        ("exec_chain", "split", 8 * 5),
        ("multi_process", "split", 11 + 13 + 17 + 19 + 23),
    ],
)
def test_the_counts_are_those_of_the_header(name: str, effect: str, count: int, programs: dict[str, Path]) -> None:
    done = subprocess.run([programs[name], "--expect"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["effects"][effect] == count


def test_the_fuzz_counts_its_own_calls(programs: dict[str, Path], tmp_path: Path) -> None:
    counts, dump = tmp_path / "counts", tmp_path / "maps"
    done = subprocess.run([programs["vmafuzz"], "5", "1500", "-c", counts, "-o", dump, "-x", "9"], timeout=60)
    assert done.returncode == 9
    lines = [json.loads(line) for line in counts.read_text().splitlines()]
    assert lines[-1]["calls"]["clone"][1] <= len(lines)
    assert all(good <= made for line in lines for made, good in line["calls"].values())
    assert "[stack]" in dump.read_text()
