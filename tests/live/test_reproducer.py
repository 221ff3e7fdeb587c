"""Reproducers of divergences run on this kernel: it does again what the trace shows."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.live.recording import VMATRACE, Recorded, record
from tests.workloads.build import build
from vmatrace.ingest import Trace
from vmatrace.replay import Verdict, run
from vmatrace.replay.reproducer import can_repeat, reproducer

AS_EXPECTED, AS_THE_TRACE_SHOWS = 0, 1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    path = tmp_path_factory.mktemp("reproducer") / "fuzz.vmat"
    return record(path, build(["vmafuzz"])["vmafuzz"], "7", "2000")


def compiled(source: Path) -> Path:
    program = source.with_suffix("")
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


def test_the_command_writes_a_program_that_repeats_it(recorded: Recorded, tmp_path: Path) -> None:
    source = tmp_path / "repeat.c"
    words = [VMATRACE, "replay", recorded.path, "--without", "flags_equal", "--reproducer", source]
    replayed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert replayed.returncode == 1, replayed.stderr
    assert "before    |" in replayed.stdout
    done = subprocess.run([compiled(source)], capture_output=True, text=True, check=False)
    assert done.returncode == AS_THE_TRACE_SHOWS, done.stdout + done.stderr
    assert "as the trace shows" in done.stdout


def first_of_each_call(verdicts: list[Verdict]) -> list[Verdict]:
    found: dict[str, Verdict] = {}
    for verdict in verdicts:
        if can_repeat(verdict):
            found.setdefault(verdict.syscall, verdict)
    return list(found.values())


@pytest.mark.parametrize("rule", ["flags_equal", "gap_reported_last", "munmap_arguments"])
def test_the_first_divergence_of_each_call_repeats(recorded: Recorded, tmp_path: Path, rule: str) -> None:
    trace = Trace(recorded.path)
    verdicts = first_of_each_call(run(trace, without=(rule,)).failed)
    assert verdicts
    for verdict in verdicts:
        source = tmp_path / f"{verdict.syscall}.c"
        source.write_text(reproducer(trace, verdict), encoding="utf-8")
        done = subprocess.run([compiled(source)], capture_output=True, text=True, check=False)
        assert done.returncode == AS_THE_TRACE_SHOWS, f"{verdict.call}\n{done.stdout}{done.stderr}"


def test_a_divergence_shrinks_to_a_few_steps(recorded: Recorded, tmp_path: Path) -> None:
    scenario = tmp_path / "small.jsonl"
    words = [VMATRACE, "replay", recorded.path, "--without", "flags_equal", "--shrink", scenario]
    replayed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert replayed.returncode == 1, replayed.stderr
    assert len(json.loads(scenario.read_text())["steps"]) <= 5, replayed.stderr
    done = subprocess.run([compiled(scenario.with_suffix(".c"))], capture_output=True, text=True, check=False)
    assert done.returncode == AS_THE_TRACE_SHOWS, done.stdout + done.stderr
    for off, status in ((), 0), (("--without", "flags_equal"), 1):
        simulated = subprocess.run([VMATRACE, "simulate", scenario, *off], capture_output=True, text=True, check=False)
        assert simulated.returncode == status, simulated.stdout
