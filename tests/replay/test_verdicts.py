"""Committed traces of 6.18.44 conform to the rules; what is switched off, altered or missing shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.replay.altering import Alterable
from vmatrace.cli import main
from vmatrace.errors import UsageError
from vmatrace.ingest import Trace
from vmatrace.replay import FAILED, PASSED, SKIPPED, SKIPPED_KINDS, UNDECIDED, run
from vmatrace.rules.registry import RULES

DATA = Path(__file__).resolve().parents[1] / "data" / "replay"
TRACES = sorted(DATA.glob("*.vmat"))
# Of the operations that changed a VMA, this share may stay undecided or skipped.
OPEN_SHARE = 0.01


@pytest.fixture(params=TRACES, ids=lambda path: path.stem)
def trace(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_conforms(trace: Path) -> None:
    found = run(trace).to_json()
    assert found["failed"] == 0, found["divergences"]
    assert found["passed"] > 50
    assert found["changing_open"] <= OPEN_SHARE * found["changing"]
    assert found["lost_records"] == 0


def test_counts_add_up(trace: Path) -> None:
    found = run(trace).to_json()
    kinds = ("passed", "failed", "undecided", "skipped", "inputs")
    assert sum(found[kind] for kind in kinds) == found["operations"]
    assert sum(sum(counts.values()) for counts in found["by_syscall"].values()) == found["operations"]
    assert sum(found["undecided_reasons"].values()) == found["undecided"]
    assert set(found["skipped_reasons"]) <= set(SKIPPED_KINDS.values())
    assert found["changing"] + found["unchanged"] == found["operations"]


def test_operations_are_numbered_as_in_the_timeline(trace: Path) -> None:
    opened = Trace(trace)
    numbered = {(operation.space, operation.n) for operation in opened.iter_operations()}
    judged = [(v.space, v.op) for v in run(opened)]
    assert set(judged) == numbered
    assert len(judged) == len(set(judged))


def test_effects_explain_how_many_vmas_there_are(trace: Path) -> None:
    opened = Trace(trace)
    assert not len(opened.miscounted_sections)
    counted: dict[str, int] = {}
    for operation in opened.iter_operations():
        if operation.kind == "exit":
            continue
        for name, count in operation.effects.items():
            counted[name] = counted.get(name, 0) + count
    effects = run(opened).effects
    effects["victim"] = effects.pop("victims")
    assert {name: count for name, count in counted.items() if count} == {
        name: count for name, count in effects.items() if count
    }


# Each of these decided in one of the traces; without it the verdicts change.
_SEEN = (
    "flags_equal", "offset_linear", "account_charged", "munmap_new_outside", "same_flags_no_merge",
    "two_anon_vmas_refuse", "fork_chains", "fork_unlocks", "write_gains_account", "grow_in_place",
)  # fmt: skip


@pytest.mark.parametrize("rule", _SEEN)
def test_a_rule_switched_off_is_missed(rule: str) -> None:
    assert rule in RULES
    assert any(run(path, without=(rule,)).failed for path in TRACES)


def test_the_rules_of_another_kernel_are_refuted() -> None:
    result = run(DATA / "fuzz.vmat", "6.1")
    assert result.rules.name == "6.1"
    assert result.failed
    assert result.status() == 1


def test_one_divergence_is_one_verdict(tmp_path: Path) -> None:
    """After a FAILED operation the model is what was seen: what follows passes again."""
    small = Alterable(DATA / "small.vmat")
    place = next(
        p
        for p in small.places("predicted")
        if p.name == "sections.map_count"
        and small.operation_of(p) in {(v.space, v.op) for v in small.result if v.verdict == PASSED}
    )
    result = small.altered(place, small.value(place) + 7, tmp_path / "altered.vmat")
    failed = [(v.space, v.op) for v in result.failed]
    assert failed[0] == small.operation_of(place)
    assert len(failed) <= 2  # the counters are wrong once going in and once coming back


def test_lost_records_leave_undecided_not_failed(tmp_path: Path) -> None:
    small = Alterable(DATA / "small.vmat")
    most = max(small.batches, key=lambda batch: len(batch["sections"]))
    del most["sections"][30:40]
    small.batches[-1]["end"][0]["lost"] = 10
    small.write(tmp_path / "lossy.vmat")
    result = run(tmp_path / "lossy.vmat")
    assert not result.failed, result.failed[0]
    assert result.count(UNDECIDED) > small.result.count(UNDECIDED)
    assert result.lost_records
    assert result.count(PASSED) > small.result.count(PASSED) / 2


def test_an_unknown_feature_that_matters_is_named() -> None:
    opened = Trace(DATA / "fuzz.vmat")
    base = run(opened).rules
    result = run(opened, base.changed(munmap_new_outside=None))
    reasons = result.reasons(UNDECIDED)
    assert any("munmap_new_outside" in reason for reason in reasons)
    assert not result.failed
    same = run(opened, base.changed(wide_flags=None))
    assert [v.verdict for v in same] == [v.verdict for v in run(opened, base)]


def test_an_unknown_feature_is_fitted_by_an_operation_that_is_not_judged() -> None:
    opened = Trace(DATA / "fuzz.vmat")
    base = run(opened, run(opened).rules)
    result = run(opened, base.rules.changed(map_stack_nohuge=None))
    assert "map_stack_nohuge" in result.rules.fitted
    assert result.rules.has("map_stack_nohuge")
    assert not result.failed
    assert result.count(UNDECIDED) == base.count(UNDECIDED) + 1
    assert "map_stack_nohuge" in result.to_json()["rules"]["fitted"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="flags_equa"):
        run(DATA / "small.vmat", without=("flags_equa",))
    with pytest.raises(UsageError):
        run(DATA / "small.vmat", "6.18.44")


# ---- the command ----


def _json(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    status = main(["replay", *map(str, words), "--format", "json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, found


def test_json_has_what_the_design_promises(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = _json(capsys, DATA / "small.vmat")
    assert status == 0
    assert found["schema"] == 1
    assert set(found["trace"]) >= {"path", "kernel", "arch", "page_size", "layers", "complete"}
    assert set(found["rules"]) >= {"name", "features"}
    assert set(found) >= {
        "operations", "changing", "passed", "failed", "undecided", "skipped", "inputs", "lost_records", "by_syscall",
        "effects", "decisions", "undecided_reasons", "divergences",
    }  # fmt: skip
    assert set(found["effects"]) >= {"merge", "split", "unmap", "new", "copy", "grow"}


def test_several_traces(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = _json(capsys, DATA / "small.vmat", DATA / "forks.vmat")
    assert status == 0
    assert [Path(one["trace"]["path"]).name for one in found["traces"]] == ["small.vmat", "forks.vmat"]


def test_a_divergence_says_what_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = _json(capsys, DATA / "small.vmat", "--without", "flags_equal")
    assert status == 1
    first = found["divergences"][0]
    assert set(first) >= {"op", "pid", "syscall", "rule", "commit", "expected", "observed", "text"}
    assert first["text"]


def test_strict_counts_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    undecided = run(DATA / "small.vmat").count(UNDECIDED)
    status, _ = _json(capsys, DATA / "small.vmat", "--strict")
    assert status == (1 if undecided else 0)


def test_the_table_names_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(DATA / "all.vmat")]) == 0
    out = capsys.readouterr().out
    result = run(DATA / "all.vmat")
    for reason in (*result.reasons(UNDECIDED), *result.reasons(SKIPPED)):
        assert reason in out
    assert f"{result.count(FAILED)} FAILED" in out


def test_csv_has_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(DATA / "small.vmat"), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(run(DATA / "small.vmat").verdicts)
    assert lines[0].startswith("trace,space,pid,tid,op,syscall,verdict")
