"""Whatever records are lost, replay finds no divergence where there is none, and finds its way back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.replay.losing import WAYS, Losable
from vmatrace.ingest import Trace
from vmatrace.replay import PASSED, SKIPPED, UNDECIDED, ReplayResult, run

DATA = Path(__file__).resolve().parents[1] / "data"
TRACES = ("replay/all", "replay/forks", "replay/small", "replay/threads", "golden/x86_64-6.1", "golden/arm64-7.3-16k")


@cache
def losable(name: str) -> Losable:
    return Losable(DATA / f"{name}.vmat")


@cache
def whole(name: str) -> ReplayResult:
    return run(DATA / f"{name}.vmat")


@pytest.fixture(scope="module")
def target() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder) / "lossy.vmat"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(TRACES), st.sampled_from(WAYS), st.integers(0, 1 << 32), st.booleans())
def test_lost_records_prove_no_divergence(target: Path, name: str, way: str, seed: int, noted: bool) -> None:
    trace = losable(name)
    lost = trace.choose(random.Random(seed), way)
    trace.write(target, lost, noted)
    result = run(target)
    assert bool(result.lost_records) == bool(lost)
    assert not result.failed, [(v.space, v.op, v.syscall, v.reason) for v in result.failed]


@pytest.mark.parametrize("name", ["replay/all", "replay/threads", "golden/x86_64-6.1"])
def test_verdicts_resume_when_all_was_read_again(target: Path, name: str) -> None:
    """A lost section leaves its address space unknown until it is read whole; from then on nothing is missing."""
    trace, base = losable(name), {(v.space, v.order): v for v in whole(name)}
    opened = Trace(trace.path)
    sections = opened.records.sections
    walks = opened.records.whole_walks()
    dice = random.Random(name)
    tried = 0
    for number in dice.sample(walks.tolist(), min(len(walks), 12)):
        space, index = int(sections["space"][number]), int(sections["index"][number])
        earlier = np.flatnonzero((sections["space"] == space) & (sections["index"] < index))
        if not len(earlier):
            continue
        lost = int(sections["index"][dice.choice(earlier.tolist())])
        trace.write(target, [lost])
        later = [v for v in run(target) if v.space == space and v.order > index and (v.space, v.order) in base]
        # The read itself belongs to an operation; the next one has known counters again.
        assert [v.verdict for v in later] == [base[v.space, v.order].verdict for v in later]
        tried += bool(later)
    assert tried


@pytest.mark.parametrize("name", ["replay/all", "replay/threads"])
def test_a_lost_call_leaves_its_own_operation_open_and_no_other(target: Path, name: str) -> None:
    trace = losable(name)
    base = {(v.space, v.order): v.verdict for v in whole(name)}
    calls = [record for record in trace.records if record.table == "calls"]
    for record in random.Random(name).sample(calls, 8):
        trace.write(target, [record.index])
        judged = {(v.space, v.order): v.verdict for v in run(target)}
        worse = [k for k, v in judged.items() if v == UNDECIDED and base.get(k) in (PASSED, SKIPPED)]
        assert len(worse) <= 2, worse
