"""How behaviour and BTF are set side by side, and what happens when the programs cannot run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.btf_blob import BtfBlob
from vmatrace import btf, fingerprint
from vmatrace.errors import VmatraceError
from vmatrace.fingerprint.programs import PROGRAMS
from vmatrace.kernel import FEATURES, Finding, detect_config


def test_every_program_tells_a_feature_or_an_option() -> None:
    options = {*detect_config(None), "soft_dirty", "thp"}
    for name in PROGRAMS:
        if name.startswith("config_"):
            assert name.removeprefix("config_") in options
        else:
            assert name in FEATURES


def test_agreement_needs_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blob = BtfBlob()
    blob.struct("vma_merge_struct", 8, [("copied_from", blob.ptr(0), 0)])
    seen = {
        "thp": Finding(True, "behaviour: present"),
        "copied_from": Finding(False, "behaviour: 4"),
        "vmg": Finding(True, "behaviour: 4+2"),
        "droppable": Finding(True, "behaviour: works"),
        "sticky_flags": Finding(None, "behaviour: no guard regions"),
    }
    compared = fingerprint.compare(seen, btf.parse(blob.blob()))
    assert {c.id: c.agrees for c in compared} == {
        "droppable": None,
        "vmg": True,
        "copied_from": False,
        "sticky_flags": None,
        "thp": None,
    }
    assert compared[-1].id == "thp", "options come last"
    assert all(c.agrees is None for c in fingerprint.compare(seen, None))


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere/python", "/bin/echo"])
def test_an_interpreter_that_does_not_work_is_one_clear_error(
    executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(VmatraceError, match=f"fingerprint, {executable}: ") as caught:
        fingerprint.observe(["vmg"])
    assert caught.value.hint


def test_programs_that_take_too_long_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_TIMEOUT_S", 0.001)
    with pytest.raises(VmatraceError, match="did not end within"):
        fingerprint.observe(["vmg"])
