"""The tracked files keep the project's limits: size, length, first line, nothing left behind."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAX_BYTES = 200_000
MAX_LINES = 400
MAX_FUNCTION_LINES = 60

# Spelled in two halves, so that this file is not its own finding.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"\bTO" + r"DO\b",
            r"\bFIX" + r"ME\b",
            r"\bXX" + r"X\b",  # mkstemp's run of X is no finding
            "NotImplemented" + "Error",
            "/wo" + "rk/",
            "/fa" + "rm/",
            "/opt/py" + "pi",
            "/opt/whe" + "els",
        )
    )
)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return sorted(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = [path for path in tracked() if path.suffix == ".py"]
PACKAGE = [path for path in PYTHON if path.is_relative_to(ROOT / "vmatrace")]


@pytest.mark.parametrize("path", tracked(), ids=short)
def test_size_and_content(path: Path) -> None:
    data = path.read_bytes()
    assert len(data) < MAX_BYTES
    if b"\0" in data:
        return
    text = data.decode()
    assert not FORBIDDEN.findall(text)
    assert not text or text.endswith("\n"), "no newline at the end"
    # What a kernel or a guest printed is kept as it is.
    if path.suffix not in (".md", ".ipynb") and not path.is_relative_to(ROOT / "tests" / "data"):
        trailing = [n for n, line in enumerate(text.splitlines(), 1) if line != line.rstrip()]
        assert not trailing, f"blanks at the end of lines {trailing[:5]}"


@pytest.mark.parametrize("path", PACKAGE, ids=short)
def test_module_is_of_readable_length(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, "split it by purpose"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The signature of a command is its list of options, not code.
            length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_first_line_says_what_the_module_is_for(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, "no docstring"
    assert doc.split("\n\n")[0].rstrip().endswith((".", ":", "?"))


SCRIPTS = [path for path in tracked() if path.parent.name in ("scripts", ".ci") and path.suffix != ".py"]


@pytest.mark.parametrize("path", SCRIPTS, ids=short)
def test_shell_scripts_are_executable_and_strict(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", path], check=True)


def test_no_skip_without_a_reason() -> None:
    bare = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "skip" and "mark" in ast.unparse(node):
                bare.append(f"{short(path)}:{node.lineno}")
    assert not bare, "use skipif with a reason, or the live marker"
