"""The golden traces of other kernels conform to the rules that they name, and end as their kernels said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.recording import assert_conforms
from tests.workloads.oracle import difference, from_timeline, read_maps
from vmatrace.ingest import Trace
from vmatrace.replay import run
from vmatrace.timeline import snapshot_document, timelines

TRACES = sorted((Path(__file__).resolve().parents[1] / "data" / "golden").glob("*.vmat"))


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_conforms_and_ends_as_the_kernel_said(path: Path) -> None:
    trace = Trace(path)
    answer = run(trace).to_json()
    assert path.name.startswith(f"{answer['trace']['arch'].replace('aarch64', 'arm64')}-")
    assert answer["passed"] > 300
    assert_conforms(answer)

    pid = trace.pids()[0]
    end = snapshot_document(timelines(trace, pid)[-1].at_end(), trace, pid)
    due, got = read_maps(path.with_suffix(".maps")), from_timeline(end["vmas"], answer["trace"]["page_size"])
    assert got == due, difference(due, got)
