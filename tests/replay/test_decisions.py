"""Real decisions of several kernels conform to the rules, agree with the operations, and fail when altered."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.replay import losing
from tests.replay.altering import Alterable, Place
from vmatrace import api, cli
from vmatrace.ingest import Trace
from vmatrace.replay import FAILED, PASSED, UNDECIDED, run
from vmatrace.schema import DECISIONS, MERGE_STATES, ROLES

TRACES = sorted((Path(__file__).resolve().parents[1] / "data" / "decisions").glob("*.vmat"))
PLAIN = Path(__file__).resolve().parents[1] / "data" / "demo.vmat"
TRIES = 2
_NAMES = {number: name for name, number in DECISIONS.items()}
_STEPS = ("MERGE_NEW", "MERGE_EXISTING", "SPLIT")
_RESULT = ROLES["ROLE_RESULT"]
# Another value of each field such as a kernel could have written.
_OTHER = {"start": 4096, "end": 4096, "pgoff": 1, "object": 64, "anon_vma": 1, "file": 1, "uffd": 1, "policy": 5}


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_decision_conforms_and_both_layers_agree(path: Path) -> None:
    trace = Trace(path)
    answer = run(trace).to_json()
    sums = answer["decisions"]
    assert answer["trace"]["layers"] == ["operations", "decisions"]
    assert not answer["divergences"], [(each["op"], each["text"]) for each in answer["divergences"][:5]]
    assert (answer["failed"], sums["failed"]) == (0, 0)
    assert sums["passed"] > 50
    # What no probe could see the header says, and the verdict: before 6.12 mmap and brk merge by themselves.
    unseen = sum(count for reason, count in sums["undecided_reasons"].items() if reason.startswith("no probe sees"))
    assert sums["undecided"] - unseen <= 0.01 * sums["passed"], sums["undecided_reasons"]
    assert not unseen or trace.feature("vmg") is False
    assert sums["split"] >= answer["effects"]["split"]
    assert sums["merge_attempt"] > sums["merge_refused"] > 0


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_refused_attempt_says_why(path: Path) -> None:
    result = run(path)
    refused = [v for v in result.decisions if v.merged is False and v.verdict == PASSED]
    assert refused
    for verdict in refused:
        assert verdict.refusals, verdict
        assert all(each.rule or each.text == "no VMA touches the range" for each in verdict.refusals)


def _places(trace: Alterable) -> Iterator[tuple[str, Place]]:
    """Every field of the answers to merges and cuts: what they returned, and the VMA that came of it."""
    for number, batch in enumerate(trace.batches):
        for at, record in enumerate(batch["decisions"]):
            what = _NAMES[record["what"]]
            if what not in _STEPS or not record["bits"] & 32:
                continue
            for field in ("result", "state", "error") if what != "SPLIT" else ("error",):
                yield f"{what}.{field}", Place(number, "decisions", at, field)
            for row, seen in enumerate(record["rows"]):
                if seen["role"] == _RESULT:
                    for field in ("start", "end", "flags", "pgoff", "object", "anon_vma", "file", "uffd", "policy"):
                        yield f"{what}.result.{field}", Place(number, "decisions", at, field, "rows", row)


def _other(place: Place, value: Any) -> Any:
    if place.field == "state":
        return MERGE_STATES["STATE_REFUSED"] if value == MERGE_STATES["STATE_MERGED"] else MERGE_STATES["STATE_MERGED"]
    if place.field == "error":
        return -22 if value == 0 else 0
    if place.field == "flags":
        return value ^ 1
    return value + _OTHER.get(place.field, 64) if value < 1 << 63 else value ^ 2


@pytest.fixture(scope="module")
def altered() -> Alterable:
    return Alterable(TRACES[-1])


def test_an_altered_answer_fails(altered: Alterable, tmp_path: Path) -> None:
    by_field: dict[str, list[Place]] = {}
    for name, place in _places(altered):
        by_field.setdefault(name, []).append(place)
    verdicts = {v.place: v for v in altered.result.decisions if v.function}
    for name, places in sorted(by_field.items()):
        for place in random.Random(name).sample(places, min(TRIES, len(places))):
            index = altered.batches[place.batch]["decisions"][place.record]["index"]
            if index not in verdicts or verdicts[index].verdict != PASSED:
                continue
            if name.endswith(".state") and not altered.value(place):
                continue  # before 6.12 there is no state
            result = altered.altered(place, _other(place, altered.value(place)), tmp_path / "altered.vmat")
            found = next(v for v in result.decisions if v.place == index and v.function)
            assert found.verdict == FAILED, (name, place, found)
            assert result.status() == 1
            assert any(each.get("decision") == found.what for each in result.to_json()["divergences"])


def test_an_altered_input_leads_to_another_verdict_or_the_same_prediction(altered: Alterable, tmp_path: Path) -> None:
    """The flags of what the kernel looked at, changed: a merge that was made must not pass."""
    checked = 0
    for number, batch in enumerate(altered.batches):
        for at, record in enumerate(batch["decisions"]):
            if _NAMES[record["what"]] != "MERGE_NEW" or record["state"] != MERGE_STATES["STATE_MERGED"] or checked > 7:
                continue
            survivor = next(at for at, row in enumerate(record["rows"]) if row["role"] == _RESULT)
            kept = record["rows"][survivor]["object"]
            at_row = next(n for n, row in enumerate(record["rows"]) if row["object"] == kept and n != survivor)
            place = Place(number, "decisions", at, "flags", "rows", at_row)
            result = altered.altered(place, altered.value(place) ^ 1, tmp_path / "altered.vmat")
            found = next(v for v in result.decisions if v.place == record["index"] and v.function)
            assert found.verdict == FAILED
            checked += 1
    assert checked


def test_a_missing_decision_makes_the_layers_undecided_not_failed(altered: Alterable, tmp_path: Path) -> None:
    batch = next(batch for batch in altered.batches if len(batch["decisions"]) > 20)
    kept = batch["decisions"]
    merged = MERGE_STATES["STATE_MERGED"]
    at = next(n for n, d in enumerate(kept) if n > 5 and (_NAMES[d["what"]] == "SPLIT" or d["state"] == merged))
    batch["decisions"] = kept[:at] + kept[at + 1 :]
    try:
        altered.write(tmp_path / "lost.vmat")
    finally:
        batch["decisions"] = kept
    result = run(tmp_path / "lost.vmat")
    assert not result.failed_decisions
    assert any(v.verdict == UNDECIDED and "lost" in v.reason for v in result.decisions)


@pytest.mark.parametrize("seed", range(6))
def test_lost_records_never_fail_a_decision(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losing, "RECORDED", (*losing.RECORDED, "decisions"))
    trace = losing.Losable(TRACES[-1])
    trace.write(tmp_path / "lost.vmat", trace.choose(random.Random(seed)))
    result = run(tmp_path / "lost.vmat")
    assert not result.failed_decisions, result.failed_decisions[:3]
    assert not result.failed, result.failed[:3]


def _show(path: Path, kind: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["show", str(path), "--kind", kind, *words]) == 0
    return capsys.readouterr().out


def test_show_lists_attempts_and_why_they_were_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sums = run(TRACES[-1]).to_json()["decisions"]
    attempts = json.loads(_show(TRACES[-1], "merge_attempt", capsys, "--format", "json"))["events"]
    assert len(attempts) == sums["merge_attempt"]
    refused = json.loads(_show(TRACES[-1], "merge_refused", capsys, "--format", "json"))["events"]
    assert len(refused) == sums["merge_refused"]
    assert all(event["reasons"] and event["function"] for event in refused)
    assert {"side", "rule", "text", "commit", "remedy"} <= set(refused[0]["reasons"][0])
    lines = _show(TRACES[-1], "merge_refused", capsys).splitlines()
    listed = [line for line in lines if " merge_refused " in line]
    assert len(listed) == len(refused)
    table = lines[len(listed) :]
    assert table[0].split()[:2] == ["refused", "alone"]
    assert sum(int(line.split()[0]) for line in table[1:]) == sum(len(event["reasons"]) for event in refused)
    assert any("[flags_equal" in line for line in lines)
    assert not [line for line in _show(TRACES[-1], "merge", capsys).splitlines() if "refused" in line]


def test_a_trace_without_the_layer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """What was refused is inferred: the demo protects a page inside a mapping, which both sides then refuse."""
    assert cli.main(["show", str(PLAIN), "--kind", "merge_refused"]) == 0
    out, err = capsys.readouterr()
    assert "no decisions layer" in err
    refused = [line for line in out.splitlines() if " merge_refused " in line]
    assert refused
    assert all("(inferred)" in line for line in refused)
    alone = "left: their flags differ: READ, WRITE [flags_equal]; right: their flags differ: READ, WRITE [flags_equal]"
    assert any("mprotect" in line and line.endswith(alone) for line in refused)


@pytest.mark.parametrize("path", [*TRACES, PLAIN], ids=lambda path: path.stem)
def test_the_table_of_hooks_adds_up(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(_show(path, "mmap_prepare", capsys, "--format", "json"))
    for row in document["adoption"]:
        assert row["mmap_prepare"] + row["mmap"] + row["compat"] <= row["maps"]
        assert row["merged"] <= row["maps"] >= row["inferred"]
    calls = [event for event in document["events"] if event["kind"] == "mmap_prepare"]
    assert sum(row["mmap_prepare"] for row in document["adoption"]) <= len(calls)
    table = _show(path, "mmap_prepare", capsys).splitlines()[len(calls) :]
    assert table[0].split()[:2] == ["file", "system"]
    assert len(table) == 1 + len(document["adoption"])
    if path == PLAIN:
        assert all(row["inferred"] == row["maps"] for row in document["adoption"])
        assert all(event["hooks"]["inferred"] for event in calls)


def test_decisions_come_as_a_frame() -> None:
    frame = api.open(TRACES[-1]).frame("decisions")
    attempts = frame[frame["what"] == "MERGE_NEW"]
    assert attempts["merged"].notna().all()
    refused = attempts[~attempts["merged"].astype(bool) & (attempts["verdict"] == "passed")]
    assert len(refused)
    assert (refused["refused_by"] != "").all()
    assert set(frame["verdict"]) <= {"passed", "failed", "undecided", ""}
