"""Random programs, recorded: the rebuilt address space against the program's own dump, and no divergence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.live.recording import Recorded, assert_conforms, assert_layout, operations, record
from tests.workloads.build import build


@pytest.fixture(scope="module")
def fuzz() -> Path:
    return build(["vmafuzz"])["vmafuzz"]


def run(fuzz: Path, folder: Path, *words: str) -> Recorded:
    """Record one fuzz with all its witnesses: ``maps``, ``counts`` and ``children/maps.PID``."""
    (folder / "children").mkdir()
    return record(
        folder / "t.vmat",
        *(fuzz, *words, "-o", folder / "maps", "-c", folder / "counts", "-C", folder / "children"),
        *("-x", "7"),
    )


@pytest.mark.parametrize("seed", [2, 3, 5, 7])
def test_the_rebuilt_space_is_the_dump_and_nothing_diverges(seed: int, fuzz: Path, tmp_path: Path) -> None:
    recorded = run(fuzz, tmp_path, str(seed), "2000")
    assert recorded.status == 7, recorded.stderr
    assert_layout(recorded, tmp_path / "maps")
    assert_conforms(recorded.replay())


def test_every_child_is_rebuilt_as_exactly(fuzz: Path, tmp_path: Path) -> None:
    recorded = run(fuzz, tmp_path, "11", "300", "--children", "7", "--ops", "default,fork=120")
    dumps = sorted((tmp_path / "children").iterdir())
    assert len(dumps) >= 7
    for dump in dumps:
        assert_layout(recorded, dump, pid=int(dump.suffix[1:]))


def test_every_call_is_an_operation(fuzz: Path, tmp_path: Path) -> None:
    recorded = run(fuzz, tmp_path, "13", "1000")
    start = record(tmp_path / "start.vmat", fuzz, "13", "0").replay()
    due: Counter[str] = Counter()
    for text in (tmp_path / "counts").read_text().splitlines():
        for name, (made, _) in json.loads(text)["calls"].items():
            due[name] += made
    answer = recorded.replay()
    # fork has an operation of its own, and prctl is made for other reasons too.
    names = [name for name in due if name not in ("clone", "prctl_set_vma")]
    found = {name: operations(answer, name) - operations(start, name) for name in names}
    assert found == {name: due[name] for name in names}


@pytest.mark.parametrize(
    "kinds",
    [
        ("--threads", "3"),
        ("--mlockall",),
        ("--ksm",),
        ("--uffd",),
        ("--ops", "mmap,munmap,mprotect,touch,fork=10"),
        ("--ops", "mremap=200,mmap=100,munmap=20,touch=100,madvise=20"),
        ("--ops", "brk=100,touch=50,mlock=30,munlock=30,mprotect=20,fork=5"),
    ],
    ids=lambda words: "-".join(words).strip("-").split("=")[0],
)
def test_special_kinds(kinds: tuple[str, ...], fuzz: Path, tmp_path: Path) -> None:
    recorded = run(fuzz, tmp_path, "17", "1000", *kinds)
    assert recorded.status == 7, recorded.stderr
    assert_layout(recorded, tmp_path / "maps")
    answer = recorded.replay()
    assert answer["failed"] == 0, answer["divergences"][:3]
