"""The committed scenarios agree under every rule set that they name; bad ones are refused with a reason."""

from __future__ import annotations

import importlib.util
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from vmatrace.errors import UsageError
from vmatrace.kernel import rule_set
from vmatrace.scenario import Scenario, parse_scenario, read_scenarios, run_scenario
from vmatrace.scenario.operations import NEEDED
from vmatrace.simulator import CALLS, STEPS

FOLDER = Path(__file__).parents[1] / "scenarios"
FILES = sorted(path.name for path in FOLDER.glob("*.jsonl"))


@cache
def load(name: str) -> tuple[Scenario, ...]:
    found = []
    for item in read_scenarios(FOLDER / name):
        assert isinstance(item, Scenario), item
        found.append(item)
    return tuple(found)


@pytest.mark.parametrize("name", FILES)
def test_every_scenario_agrees(name: str) -> None:
    for scenario in load(name):
        assert scenario.rules, scenario.name
        for rules in scenario.rules:
            for outcome in run_scenario(scenario, rule_set(rules)):
                assert outcome.agrees is not False, (rules, outcome.name, outcome.differences)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_userland", FOLDER / "generate_userland.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["userland.jsonl", "userland-sticky.jsonl"])
def test_userland_files_are_what_the_table_says(name: str) -> None:
    assert generator().text(name) == (FOLDER / name).read_text(encoding="utf-8")


def test_files_stay_small() -> None:
    assert all((FOLDER / name).stat().st_size < 200_000 for name in FILES)


def test_the_example_of_the_docs_is_true() -> None:
    page = (FOLDER.parents[1] / "docs" / "scenarios.md").read_text(encoding="utf-8")
    example = json.loads(page.split("```json")[1].split("```")[0])
    assert [each.agrees for each in run_scenario(parse_scenario(json.dumps(example)), rule_set("6.18"))] == [True]


BASE = {"name": "x", "vmas": [], "operation": {"op": "munmap", "addr": 4096, "len": 4096}}
VMA = {"start": 4096, "end": 8192, "pgoff": 1, "flags": ["READ"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vmas": [{**VMA, "end": 4096}]}, "empty range"),
        ({"vmas": [{**VMA, "start": 4097}]}, "page boundary"),
        ({"vmas": [VMA, VMA]}, "overlaps"),
        ({"vmas": [{**VMA, "flags": ["REED"]}]}, "unknown flag"),
        ({"vmas": [{**VMA, "end": 1 << 65}]}, "past the end"),
        ({"vmas": [{**VMA, "forked": True}]}, "forked"),
        ({"vmas": [{"end": 4096}]}, "start is missing"),
        ({"operation": {"op": "munmapp"}}, "unknown operation"),
        ({"operation": {"op": "copy_vma", "vma": 3, "to": 0, "length": 4096}}, "no VMA number 3"),
        ({"operation": {"op": "merge_new", "start": 0, "end": 4096}}, "needs flags"),
        ({"operation": {"op": "mmap", "addr": 0, "len": 1, "prot": "PROT_REED"}}, "unknown constant"),
        ({"operations": []}, "unknown field"),
        ({"steps": []}, "either an operation or steps"),
        ({"source": "hearsay"}, "source"),
        ({"page_size": 4097}, "power of two"),
        ({"limits": {"max_maps": 1}}, "unknown limit"),
        ({"config": {"softdirty": 1}}, "unknown config"),
        ({"config": {"soft_dirty": 7}}, "neither true nor false"),
        ({"vmas": [{**VMA, "flags": "READ"}]}, "flags is not a list"),
        ({"vmas": [{**VMA, "flags": [1]}]}, "no text"),
        ({"vmas": [{**VMA, "close": "no"}]}, "neither true nor false"),
        ({"vmas": [{**VMA, "pgoff": -1}]}, "no page offset"),
        ({"vmas": [{**VMA, "start": 1 << 60, "end": (1 << 60) + 4096}]}, "past the end"),
        ({"vmas": [{**VMA, "policy": ["bind"]}]}, "policy"),
        ({"operation": {"op": "mmap", "addr": 0, "prot": 1}}, "mmap needs len"),
        ({"operation": {"op": "mbind", "start": 0, "len": 4096}}, "mbind needs policy"),
        ({"operation": {"op": "prctl", "option": 0x53564D41}}, "prctl needs arg3"),
        ({"operation": {"op": "modify", "start": 0, "end": 4096, "flag": []}}, "unknown field of modify"),
        ({"operation": {"op": "merge_extend", "vma": 0, "delta": 0}}, "delta is 0"),
        ({"operation": {"op": "copy_vma", "vma": 0, "to": (1 << 56) - 4096, "length": 8192}}, "past the end"),
        ({"operation": {"op": "munmap", "addr": 1 << 64, "len": 1}}, "does not fit in a register"),
        ({"operation": {"op": "mmap", "len": 1, "prot": 1, "file": {"prepared": True}}}, "unknown field of file"),
        ({"expect": {"ret": "0"}}, "ret '0' is no number"),
        ({"expect": {"outcome": 1}}, "no text"),
        ({"expect": {"vmas": [{"end": 4096}]}}, "expect: VMA 0: start is missing"),
        ({"rules": 618}, "rules is not a list"),
        ({"rules": [618]}, "no text"),
    ],
)
def test_bad_input_says_what_is_wrong(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_scenario(json.dumps({**BASE, **change}))


def test_no_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="steps is empty"):
        parse_scenario(json.dumps({"vmas": [], "steps": []}))


def test_every_operation_says_what_it_needs() -> None:
    assert set(NEEDED) == {*STEPS, *CALLS}
    for name, needed in NEEDED.items():
        if name == "mmap_region":
            continue
        given: dict[str, object] = {key: [] if key == "flags" else 4096 for key in needed}
        if "end" in given:
            given["end"] = 8192
        if name in STEPS and "vma" in given:
            given["vma"] = 0
        line = {**BASE, "vmas": [VMA], "operation": {"op": name, **given}}
        scenario = parse_scenario(json.dumps(line))
        with suppress(UsageError):  # an input that no rule knows
            run_scenario(scenario, rule_set("7.1"))
        for key in needed:
            rest = {other: value for other, value in given.items() if other != key}
            with pytest.raises(UsageError, match=f"{name} needs {key}"):
                parse_scenario(json.dumps({**line, "operation": {"op": name, **rest}}))


def test_a_step_may_name_a_vma_that_an_earlier_one_made() -> None:
    flags = ["READ", "MAYREAD", "MAYWRITE"]
    cut = {"operation": {"op": "modify", "start": 4096, "end": 8192, "flags": ["MAYREAD", "MAYWRITE"]}}
    moved = {"operation": {"op": "copy_vma", "vma": 1, "to": 32768, "length": 4096}, "expect": {"outcome": "copy"}}
    vmas = [{"start": 4096, "end": 12288, "flags": flags}]
    outcomes = run_scenario(parse_scenario(json.dumps({"vmas": vmas, "steps": [cut, moved]})), rule_set("6.18"))
    assert [outcome.agrees for outcome in outcomes] == [None, True]
    missing = json.dumps({"vmas": vmas, "steps": [cut, {"operation": {**moved["operation"], "vma": 9}}]})
    with pytest.raises(UsageError, match="f:1: copy_vma: there is no VMA number 9"):
        run_scenario(parse_scenario(missing, "f:1"), rule_set("6.18"))


@pytest.mark.parametrize("range_", [(8192, 4096), (4096, 4096), (4097, 8192), (4096, (1 << 64) - 1)])
def test_munmap_of_a_bad_range_is_the_kernels_error(range_: tuple[int, int]) -> None:
    start, end = range_
    line = {"vmas": [VMA], "operation": {"op": "munmap", "start": start, "end": end}}
    (outcome,) = run_scenario(parse_scenario(json.dumps(line)), rule_set("7.1"))
    assert (outcome.outcome, outcome.errno, len(outcome.vmas)) == ("error", "EINVAL", 1)


def test_an_identity_may_be_an_object_as_timeline_prints_it() -> None:
    file = {"path": "/bin/true", "dev": 1, "ino": 2}
    vma = {**VMA, "file": file}
    line = {"vmas": [vma], "operation": {"op": "munmap", "addr": 65536, "len": 4096}, "expect": {"vmas": [vma]}}
    assert run_scenario(parse_scenario(json.dumps(line)), rule_set("6.18"))[0].agrees


@pytest.mark.parametrize("line", ["[]", "{", "3", "[" * 100_000, '{"page_size": 1' + "0" * 5000 + "}"])
def test_a_line_that_is_no_object_is_refused(line: str) -> None:
    with pytest.raises(UsageError):
        parse_scenario(line)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(BASE) + "\n\n{\n", encoding="utf-8")
    items = list(read_scenarios(path))
    assert isinstance(items[0], Scenario)
    assert isinstance(items[1], UsageError)
    assert items[1].message.startswith(f"{path}:3: ")
