"""vmatrace simulate and vmatrace rules as a user meets them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from vmatrace.cli import main

PAGE = 4096


def line(**more: object) -> str:
    left = {"start": 0, "end": PAGE, "pgoff": 0, "flags": ["READ"]}
    grown = {**left, "end": 2 * PAGE}
    new = {"op": "merge_new", "start": PAGE, "end": 2 * PAGE, "pgoff": 1, "flags": ["READ"]}
    expect = {"outcome": "merge_left", "errno": None, "vmas": [grown]}
    return json.dumps({"name": "grow", "vmas": [left], "operation": new, "expect": expect, **more})


def write(path: Path, *lines: str) -> str:
    file = path / "s.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def test_agreement_exits_0_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", write(tmp_path, line())]) == 0
    out, err = capsys.readouterr()
    assert "grow: merge_left agrees" in out
    assert "before  |a|" in out
    assert "after   |aaa|" in out
    assert "0 disagree" in err


def test_a_difference_exits_1_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect = {"outcome": "none", "errno": None, "vmas": []}
    assert main(["simulate", write(tmp_path, line(expect=expect)), "--rules", "7.1"]) == 1
    out, _ = capsys.readouterr()
    assert "DISAGREES" in out
    assert "outcome: expected none, got merge_left" in out


@pytest.mark.parametrize(
    ("kernel", "rules", "outcome"),
    [("7.1.3", [], "merge_left"), ("7.1.3", ["6.12"], "none"), ("6.12.117", [], "none"), ("5.4", [], "none")],
)
def test_without_rules_the_release_of_the_kernel_decides(
    kernel: str, rules: list[str], outcome: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Sticky flags, of 6.19, let a range with guard markers join one without.
    guarded = {"start": 0, "end": PAGE, "pgoff": 0, "flags": ["READ", "MAYBE_GUARD"]}
    path = write(tmp_path, line(vmas=[guarded], expect={"outcome": outcome}, kernel=kernel, rules=rules))
    assert main(["simulate", path]) == 0
    assert "agrees" in capsys.readouterr().out
    assert main(["simulate", write(tmp_path, line(kernel=7))]) == 2


def test_json_has_the_promised_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", write(tmp_path, line(), line(expect=None)), "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == 1
    first, second = data["results"]
    assert set(first) == {"name", "outcome", "errno", "vmas", "agrees", "rules"}
    assert (first["agrees"], second["agrees"]) == (True, None)
    assert first["vmas"][0]["end"] == 2 * PAGE


def test_bad_lines_exit_2_and_name_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, line(), line(page_size=5))
    assert main(["simulate", path]) == 2
    assert f"error: {path}:2: page_size 5" in capsys.readouterr().err
    assert main(["simulate", path, "--keep-going"]) == 2
    out, err = capsys.readouterr()
    assert "grow: merge_left agrees" in out
    assert f"{path}:2" in err


def test_an_impossible_step_is_bad_input_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = {"op": "merge_new", "start": 0, "end": PAGE, "pgoff": 0, "flags": ["READ"]}
    assert main(["simulate", write(tmp_path, line(operation=new))]) == 2
    assert "not free" in capsys.readouterr().err


def test_a_rule_switched_off_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = json.loads(line())
    other["operation"]["flags"] = ["WRITE"]
    other["expect"] = {"outcome": "none", "vmas": other["vmas"]}
    path = write(tmp_path, json.dumps(other))
    assert main(["simulate", path]) == 0
    assert main(["simulate", path, "--without", "flags_equal"]) == 1
    capsys.readouterr()
    assert main(["simulate", path, "--without", "flag_equal"]) == 2
    assert "flags_equal" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["simulate", "rules"])
@pytest.mark.parametrize(
    ("rules", "near"),
    [("6.99", "6.19"), ("6.18.44", "6.18"), ("6.18+copied_fro", "copied_from"), ("autoo", "auto"), ("auto-vgm", "vmg")],
)
def test_unknown_rule_sets_are_refused_with_the_nearest_name(
    tmp_path: Path, command: str, rules: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios = [write(tmp_path, line())] if command == "simulate" else []
    assert main([command, *scenarios, "--rules", rules]) == 2
    assert near in capsys.readouterr().err.partition("hint:")[2]


def test_auto_is_this_kernels_rule_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", write(tmp_path, line()), "--rules", "auto"]) == 0
    assert "rules auto (measured)" in capsys.readouterr().err
    listed = {}
    for rules in ("auto", "auto-vmg"):
        assert main(["rules", "--rules", rules, "--format", "json"]) == 0
        listed[rules] = {rule["id"] for rule in json.loads(capsys.readouterr().out)["rules"]}
    assert "close_next_refuses" in listed["auto-vmg"] - listed["auto"]


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    assert main(["simulate", write(tmp_path, "")]) == 2
    assert main(["simulate", str(tmp_path / "missing")]) == 2


def test_a_scenario_runs_under_the_rules_that_it_names(tmp_path: Path) -> None:
    closed = {"start": 0, "end": PAGE, "pgoff": 0, "flags": ["READ"], "close": True, "anonymous": True}
    expect = {"outcome": "none", "vmas": [closed]}
    path = write(tmp_path, line(vmas=[closed], expect=expect, rules="6.1"))
    assert main(["simulate", path]) == 0
    assert main(["simulate", path, "--rules", "6.18"]) == 1


def test_scenarios_come_from_standard_input_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"name": "piped", "vmas": [], "operation": {"op": "munmap", "addr": 4096, "len": 4096}}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(line) + "\n{\n"))
    assert main(["simulate", "-", "--keep-going"]) == 2
    printed = capsys.readouterr()
    assert "piped: none" in printed.out
    assert "error: -:2: not JSON" in printed.err


def test_rules_are_found_by_id_and_by_kernel_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "flags_equal"]) == 0
    assert "Flags must be equal" in capsys.readouterr().out
    assert main(["rules", "mprotect_fixup"]) == 0
    assert "write_gains_account" in capsys.readouterr().out
    assert main(["rules", "879bca0a2c4f"]) == 0
    assert "fork_child_source_refuses" in capsys.readouterr().out
    assert main(["rules", "flags_equl"]) == 2
    assert "flags_equal" in capsys.readouterr().err


def test_rules_can_be_listed_for_one_rule_set(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {}
    for name in ("6.1", "7.3"):
        assert main(["rules", "--rules", name, "--format", "json"]) == 0
        listed[name] = {rule["id"] for rule in json.loads(capsys.readouterr().out)["rules"]}
    assert "close_refuses" in listed["6.1"] - listed["7.3"]
    assert "anon_offset_linear" in listed["7.3"] - listed["6.1"]


def test_every_rule_has_a_sentence_and_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "--format", "json"]) == 0
    for rule in json.loads(capsys.readouterr().out)["rules"]:
        assert rule["sentence"].endswith("."), rule["id"]
        assert rule["kernel_function"]
        assert rule["module"].startswith("vmatrace.rules.")
