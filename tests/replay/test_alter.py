"""Altering one field of one record must change the verdict there: nothing passes by copying the answer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.replay.altering import Alterable, Place, field_of, other_value, verdict_of
from vmatrace.errors import BadTrace
from vmatrace.replay import FAILED, INPUT, PASSED, UNDECIDED
from vmatrace.schema import CALL_FIELDS, INFORMATIONAL, PREDICTED, ROW_TABLES, SECTION_FIELDS, TASK_FIELDS
from vmatrace.schema import INPUT as INPUT_ROLE

DATA = Path(__file__).resolve().parents[1] / "data" / "replay"
TRIES = 3


def _names(role: str) -> list[str]:
    """Every field of a role, as a `Place` names it."""
    found = []
    for table, fields in (("sections", SECTION_FIELDS), ("calls", CALL_FIELDS), ("tasks", TASK_FIELDS)):
        for field in fields:
            nested = ROW_TABLES.get(field.type[5:-1]) if field.type.startswith("list<") else None
            if nested:
                found += [f"{table}.{field.name}.{inner.name}" for inner in nested if inner.role == role]
            elif field.role == role:
                found.append(f"{table}.{field.name}")
    return found


@pytest.fixture(scope="module")
def small() -> Alterable:
    return Alterable(DATA / "small.vmat")


@pytest.fixture(scope="module")
def forks() -> Alterable:
    return Alterable(DATA / "forks.vmat")


def _chosen(trace: Alterable, name: str, role: str, verdicts: tuple[str, ...]) -> list[Place]:
    """A few records, the same in each run, of operations with one of these verdicts."""
    decided = {(v.space, v.op) for v in trace.result if v.verdict in verdicts}
    found = [p for p in trace.places(role) if p.name == name and trace.operation_of(p) in decided]
    return random.Random(name).sample(found, min(TRIES, len(found)))


@pytest.mark.parametrize("name", _names(PREDICTED))
def test_an_altered_prediction_fails(name: str, small: Alterable, forks: Alterable, tmp_path: Path) -> None:
    trace = forks if name.startswith("tasks.") else small
    places = _chosen(trace, name, PREDICTED, (PASSED, INPUT))
    assert places, f"no record of {trace.trace.path} holds {name}"
    for place in places:
        result = trace.altered(place, other_value(place, trace.value(place)), tmp_path / "altered.vmat")
        operation = trace.operation_of(place)
        assert operation is not None
        verdict = verdict_of(result, operation)
        assert verdict is not None
        assert result.status() == 1, f"{place}: {verdict}"
        if verdict.verdict == INPUT:
            # An exec's layout is an input: the model is then wrong, and the next look at that VMA says so.
            assert verdict.syscall == "execve", f"{place}: {verdict}"
            continue
        assert verdict.verdict == FAILED, f"{place}: {verdict}"
        assert operation in [(v["space"], v["op"]) for v in result.to_json()["divergences"]]


@pytest.mark.parametrize("name", _names(INPUT_ROLE))
def test_an_altered_input_never_passes_unless_it_predicts_the_same(
    name: str, small: Alterable, tmp_path: Path
) -> None:
    for place in _chosen(small, name, INPUT_ROLE, (PASSED,)):
        value = small.value(place)
        limit = (1 << int(field_of(place).type[1:])) - 1
        try:
            result = small.altered(place, (value + 1) & limit, tmp_path / "altered.vmat")
        except BadTrace:
            continue  # a trace that contradicts itself is refused as a whole
        operation = small.operation_of(place)
        assert operation is not None
        verdict = verdict_of(result, operation)
        before = verdict_of(small.result, operation)
        if verdict is not None and before is not None and verdict.verdict == PASSED:
            # The prediction is what both evidences say; they are as they were.
            assert verdict.counts == before.counts or result.failed or result.count(UNDECIDED), place


@pytest.mark.parametrize("name", _names(INFORMATIONAL))
def test_what_only_informs_decides_nothing(name: str, small: Alterable, tmp_path: Path) -> None:
    for place in _chosen(small, name, INFORMATIONAL, (PASSED,)):
        result = small.altered(place, other_value(place, small.value(place)), tmp_path / "altered.vmat")
        assert [v.verdict for v in result] == [v.verdict for v in small.result], place


def test_a_trace_rewritten_is_the_same_trace(small: Alterable, tmp_path: Path) -> None:
    from vmatrace.replay import run

    small.write(tmp_path / "same.vmat")
    assert [v[:6] for v in run(tmp_path / "same.vmat")] == [v[:6] for v in small.result]
