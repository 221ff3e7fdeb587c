"""Random programs of a toy kernel: every state and effect comes back; after losses nothing known is wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tracebuilder import READ, WRITE, ToyKernel, ToySpace
from vmatrace.ingest import Trace
from vmatrace.timeline import Timeline

RANGES = st.tuples(st.integers(2, 40), st.integers(1, 8))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("map", "join", "unmap", "protect", "touch", "fork")),
        RANGES,
        st.sampled_from((0, READ, READ | WRITE)),
        st.integers(0, 3),
    ),
    max_size=40,
)
LONG = st.lists(
    st.tuples(st.sampled_from(("map", "unmap", "protect")), RANGES, st.sampled_from((0, READ)), st.just(0)),
    min_size=6,
    max_size=30,
)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(steps: list[tuple[str, tuple[int, int], int, int]], ends: bool) -> ToyKernel:
    kernel = ToyKernel()
    spaces = [kernel.start((4, 8, READ), (10, 12, READ | WRITE))]
    for what, (lo, length), flags, which in steps:
        space = spaces[which % len(spaces)]
        if what in ("map", "join"):
            kernel.map(space, lo, lo + length, flags, join=what == "join")
        elif what == "unmap":
            kernel.unmap(space, lo, lo + length)
        elif what == "protect":
            kernel.protect(space, lo, lo + length, flags)
        elif what == "touch":
            kernel.touch(space, lo)
        elif len(spaces) < 4:
            spaces.append(kernel.fork(space))
    if ends:
        for space in reversed(spaces):
            kernel.exit(space)
    return kernel


def seen(timeline: Timeline, n: int) -> list[tuple[int, int, int, int]]:
    return [tuple(vma[:4]) for vma in timeline.at_op(n).vmas]


def check_space(trace: Trace, space: ToySpace) -> None:
    timeline = Timeline(trace, space.id)
    assert len(trace.operation_rows(space.id)) == len(space.truth)
    for n, truth in enumerate(space.truth):
        assert seen(timeline, n) == truth, n
        effects = trace.operation(trace.operation_row(space.id, n)).effects
        assert {name: count for name, count in effects.items() if count} == space.effects[n], n
    end = timeline.at_end()
    assert [tuple(vma[:4]) for vma in end.vmas] == space.truth[-1]
    assert not end.unknown
    faulted = {area.start * 4096 for area in space.areas if area.anon_vma}
    if space.truth and trace.spaces[space.id].ended:
        assert {vma.start for vma in end.vmas if vma.anon_vma} == faulted


@SETTINGS
@given(STEPS, st.booleans(), st.integers(1, 60))
def test_every_state_and_effect_comes_back(steps: list, ends: bool, batch: int) -> None:
    kernel = run(steps, ends)
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace(kernel.write(Path(folder) / "t", batch))
        assert trace.complete
        assert trace.lost_records == 0
        assert not trace.operations.flags.any()
        for space in kernel.spaces:
            check_space(trace, space)
        trace.close()


@SETTINGS
@given(LONG, st.sets(st.integers(0, 1000), min_size=1, max_size=4), st.integers(0, 3))
def test_after_losses_nothing_known_is_wrong(steps: list, lost_sections: set[int], calls: int) -> None:
    kernel = run(steps, ends=False)
    writes = [at for at, (table, _) in enumerate(kernel.records) if table == "sections"][1:]
    lost = {writes[number % len(writes)] for number in lost_sections} | {at + 1 for at in writes[:calls]}
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace(kernel.write(Path(folder) / "t", drop=lambda at: at in lost))
        for space in kernel.spaces:
            if space.id not in trace.spaces:
                continue
            timeline = Timeline(trace, space.id)
            end = timeline.at_end()
            known = set(space.truth[-1])
            for vma in end.vmas:
                assert tuple(vma[:4]) in known
            missing = known - {tuple(vma[:4]) for vma in end.vmas}
            for start, stop, _, _ in missing:
                assert any(lo < stop and start < hi for lo, hi in end.unknown)
        trace.close()


@SETTINGS
@given(STEPS, st.integers(0, 400))
def test_a_state_at_a_time_is_the_state_of_the_operation_before(steps: list, moment: int) -> None:
    kernel = run(steps, ends=True)
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace(kernel.write(Path(folder) / "t"))
        for space in kernel.spaces:
            timeline = Timeline(trace, space.id)
            time = max(moment * 10, timeline.space.time - trace.records.first_time)
            shot = timeline.at(time)
            rows = trace.operation_rows(space.id)
            done = 0
            for n in range(len(rows)):
                sections = trace.operation(rows[n]).sections
                if sections and sections[-1].time <= trace.records.first_time + time:
                    done = n
            assert [tuple(vma[:4]) for vma in shot.vmas] == space.truth[done]
        trace.close()
