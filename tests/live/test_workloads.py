"""Counted workloads, recorded: what vmatrace counts must equal what the programs did, to the last one.

Each program counts in primes and knows its own effects; the loader's are measured by a recording of the
same program with ``--baseline`` and come off once per image executed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.live.recording import assert_conforms, assert_layout, operations, record
from tests.workloads.build import COUNTED, build

EFFECTS = ("merge", "split", "unmap", "new", "copy")
# The heap of `threads` is part of its start; all others start alike.
OWN_BASELINE = ("threads",)


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return build()


@pytest.fixture(scope="module")
def baseline(programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The replay of a program's start alone, recorded once per kind of start."""

    @functools.cache
    def get(name: str) -> dict[str, Any]:
        path = tmp_path_factory.mktemp("baseline") / f"{name}.vmat"
        recorded = record(path, programs[name], "--baseline")
        assert recorded.status == 0, recorded.stderr
        return recorded.replay()

    return lambda name: get(name if name in OWN_BASELINE else "splits")


@pytest.mark.parametrize("name", COUNTED)
def test_effects_calls_and_layout_are_exactly_what_the_program_did(
    name: str, programs: dict[str, Path], baseline: Any, tmp_path: Path
) -> None:
    dump = tmp_path / "maps"
    recorded = record(tmp_path / "t.vmat", programs[name], "--expect", "-o", dump, "-x", "11")
    assert recorded.status == 11, recorded.stderr
    assert_layout(recorded, dump)
    answer, start = recorded.replay(), baseline(name)
    assert_conforms(answer)
    due = json.loads(recorded.stdout)
    counted = {
        effect: answer["effects"].get(effect, 0) - due["images"] * start["effects"].get(effect, 0) for effect in EFFECTS
    }
    assert counted == {effect: due["effects"][effect] for effect in EFFECTS}
    calls = {call for call, number in due["calls"].items() if number and call not in ("fork", "exec")}
    counted = {call: operations(answer, call) - due["images"] * operations(start, call) for call in sorted(calls)}
    assert counted == {call: due["calls"][call] for call in sorted(calls)}


def test_in_place_growth_counts_as_grow_as_well(programs: dict[str, Path], baseline: Any, tmp_path: Path) -> None:
    for name, due in (("brk_growth", 42), ("mremap_counts", 29 + 3)):
        recorded = record(tmp_path / f"{name}.vmat", programs[name])
        grown = recorded.replay()["effects"].get("grow", 0)
        assert grown - baseline(name)["effects"].get("grow", 0) == due, name
