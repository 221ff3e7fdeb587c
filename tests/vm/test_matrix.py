"""Every kernel of the matrix, booted in a guest: it records there, and conforms to its rules here."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.vm.matrix import COMPILERS, MATRIX, OPERATIONS, Entry, build, describe, judge, keep, run

DUMPED = ("vmafuzz", "corners")


@functools.cache
def programs(arch: str) -> list[Path]:
    return build(arch, Path(tempfile.mkdtemp(prefix=f"vmatrace-{arch}-")))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("entry", MATRIX, ids=str)
def test_kernel(entry: Entry, tmp_path: Path) -> None:
    if shutil.which(COMPILERS[entry.arch]) is None:
        pytest.skip(f"no compiler for {entry.arch}: install gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    done = run(entry, programs(entry.arch), tmp_path, OPERATIONS)
    assert done.returncode == 0, done.stderr
    status = (tmp_path / "status").read_text()
    assert status == "record 0\nfingerprint 0\n", status + (tmp_path / "record.err").read_text()

    outcome = describe(entry, tmp_path / "fingerprint.json", done.stderr)
    outcome.corners = "; ".join((tmp_path / "corners.out").read_text().splitlines())
    dumps = {tmp_path / f"{name}.maps": (tmp_path / f"{name}.pid").read_text().strip() for name in DUMPED}
    try:
        problems = judge(outcome, tmp_path / "all.vmat", dumps)
    finally:
        keep(outcome)
    assert not problems, "\n".join(problems)
    assert not outcome.disagreements
