"""A module imports only from the layers above its own, and no two modules need each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vmatrace"

# Top to bottom: a module may import from its own row and from the rows before it.
LAYERS = (
    ("schema", "errors", "btf", "resources", "syscalls"),
    ("kernel",),
    ("vma", "rules", "simulator", "scenario"),
    ("tracefile", "ingest", "timeline"),
    ("replay", "explain", "fingerprint"),
    ("frames", "report"),
    ("capture", "lab"),
    ("api",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def part_of(path: Path) -> str:
    """The layer's name of a file: vmatrace/rules/merge.py is part of `rules`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    # vmatrace/__init__.py is the front door: it reaches api lazily and is imported by everybody.
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_parts(path: Path) -> Iterator[str]:
    """The parts of vmatrace that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "vmatrace" and len(pieces) > 1 and pieces[1] != "__version__":
                yield pieces[1]


def test_every_part_has_a_layer() -> None:
    unknown = {part_of(path) for path in sources()} - set(RANK)
    assert not unknown, f"give these a row in LAYERS (and in the design): {sorted(unknown)}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_the_layers_above(path: Path) -> None:
    own = part_of(path)
    wrong = sorted({part for part in imported_parts(path) if RANK[part] > RANK[own]})
    assert not wrong, f"{own} must not import {wrong}"


def test_no_two_parts_need_each_other() -> None:
    needs: dict[str, set[str]] = {name: set() for name in RANK}
    for path in sources():
        needs[part_of(path)] |= set(imported_parts(path)) - {part_of(path)}
    reach = {name: _closure(name, needs) for name in needs}
    circles = sorted(name for name in needs if name in reach[name])
    assert not circles, f"in an import circle: {circles}"


def _closure(start: str, needs: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(needs[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(needs[name])
    return seen


def test_only_capture_imports_bcc() -> None:
    users = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            if any(module.split(".")[0] == "bcc" for module in modules):
                users.add(part_of(path))
    assert users <= {"capture"}


def test_import_works_without_bcc_and_is_light() -> None:
    code = (
        "import sys; sys.modules['bcc'] = None; import vmatrace, vmatrace.cli\n"
        "heavy = {'numpy', 'pandas', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
