"""The fingerprint of the running kernel: behaviour and BTF must say the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from vmatrace import btf
from vmatrace.fingerprint import compare, live_profile, observe
from vmatrace.fingerprint.programs import PROGRAMS
from vmatrace.kernel import FEATURES


def test_every_program_answers_and_none_contradicts_the_kernels_btf() -> None:
    seen = observe()
    assert set(seen) == {name.removeprefix("config_") for name in PROGRAMS}
    compared = compare(seen, btf.load())
    disagreeing = {c.id: (c.behaviour, c.described) for c in compared if c.agrees is False}
    assert not disagreeing
    assert all(c.behaviour.detector.startswith("behaviour: ") for c in compared)
    known = [c.id for c in compared if c.behaviour.value is not None and c.id in FEATURES]
    assert len(known) >= 12


def test_the_live_profile_leaves_nothing_unknown() -> None:
    profile = live_profile(btf.load())
    assert not [key for key in profile.rule_set().unknown if FEATURES[key].observable]


def test_it_needs_no_root_and_gives_the_same_answers(vmatrace: Path) -> None:
    def rows(*prefix: str) -> dict[str, bool | None]:
        command = [*prefix, vmatrace, "fingerprint", "--format", "json"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return {row["id"]: row["behaviour"] for row in json.loads(run.stdout)["features"]}

    assert rows("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") == rows()


@pytest.mark.parametrize("run", range(5))
def test_repeated_runs_agree(run: int) -> None:
    first, second = (
        observe(["vmg", "copied_from", "sticky_flags"]),
        observe(["vmg", "copied_from", "sticky_flags"]),
    )
    assert first == second


def test_the_text_names_the_nearest_rule_set(vmatrace: Path) -> None:
    run = subprocess.run([vmatrace, "fingerprint"], capture_output=True, text=True, timeout=60, check=True)
    assert "nearest rule set: " in run.stdout
    assert "0 against the kernel's BTF" in run.stdout
    assert run.stderr == ""
