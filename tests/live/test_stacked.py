"""Files of a stacked file system: the VMA holds another file than mmap was given, so that neighbours stay apart."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.recording import VMATRACE, assert_layout, record, vmatrace_json

CORNERS = Path(__file__).resolve().parents[1] / "vm" / "corners.c"


def _mount(*words: str | Path) -> str:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A directory on an overlayfs of its own, with a file to map."""
    where = tmp_path / "overlay"
    layers = tmp_path / "layers"
    where.mkdir()
    layers.mkdir()
    problem = _mount("-t", "tmpfs", "none", layers)
    for name in ("lower", "upper", "work"):
        (layers / name).mkdir()
    options = ",".join(f"{name}dir={layers / name}" for name in ("lower", "upper", "work"))
    problem = problem or _mount("-t", "overlay", "-o", options, "overlay", where)
    if problem:
        pytest.skip(f"overlayfs cannot be mounted here: {problem}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=False)
        subprocess.run(["umount", layers], check=False)


def test_contiguous_maps_of_an_overlay_file_stay_apart(overlay: Path, tmp_path: Path) -> None:
    program, dump = tmp_path / "corners", tmp_path / "maps"
    subprocess.run(["gcc", "-O2", "-o", program, CORNERS], check=True, timeout=60)
    recorded = record(tmp_path / "t.vmat", program, dump, overlay / "file")
    assert recorded.status == 0, recorded.stderr
    assert_layout(recorded, dump)
    answer = recorded.replay()
    assert (answer["failed"], answer["lost_records"]) == (0, 0), answer["divergences"][:3]
    # The program also asks for huge pages, which may not be there.
    assert answer["undecided"] <= 1, answer["undecided_reasons"]
    shown = vmatrace_json("show", recorded.path, "--kind", "mmap_prepare", "--format", "json")
    rows = {row["name"]: row for row in shown["adoption"]}
    assert rows["secretmem"]["maps"] > 1
    done = subprocess.run([VMATRACE, "show", recorded.path, "--kind", "mmap_prepare"], capture_output=True, check=True)
    assert b"file system or driver" in done.stdout
