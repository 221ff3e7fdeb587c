"""What is built is complete: the wheel has the BPF sources and finds them without a checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vmatrace.resources import bpf_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_checkout_uses_its_own_bpf_folder() -> None:
    assert bpf_dir() == ROOT / "bpf"


def test_wheel_has_every_bpf_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.name for path in (ROOT / "bpf").iterdir() if path.suffix in (".c", ".h")}
    assert sources
    assert {f"vmatrace/bpf/{name}" for name in sources} <= names
    assert "vmatrace/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]


def test_unpacked_wheel_finds_its_bpf_files(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom vmatrace.resources import bpf_dir; print(bpf_dir())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert Path(done.stdout.strip()) == tmp_path / "vmatrace" / "bpf"
