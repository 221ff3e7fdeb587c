"""The commands, their help and the README say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmatrace.cli import COMMANDS, CommandEntry, load

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FIRST_SCREEN = "\n".join(README.splitlines()[:40])

# A word of a command line in the README that stands for something is written in capitals.
COMMAND_LINE = re.compile(r"^(?:\$ |# )?(?:sudo )?(?:\.venv/bin/)?vmatrace +(.+)$", re.MULTILINE)


def help_of(vmatrace: Path, *words: str) -> str:
    done = subprocess.run([vmatrace, *words, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


def code_blocks() -> str:
    return "\n".join(re.findall(r"```[a-z]*\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_command_exists_and_explains_itself(entry: CommandEntry, vmatrace: Path) -> None:
    module = load(entry)
    assert hasattr(module, "command") or hasattr(module, "app")
    text = help_of(vmatrace, entry.name)
    assert text.startswith(f"Usage: vmatrace {entry.name}")
    assert max(len(line) for line in text.splitlines()) <= 100


def test_help_lists_each_command_with_its_summary(vmatrace: Path) -> None:
    text = help_of(vmatrace)
    for entry in COMMANDS:
        assert re.search(rf"^  {entry.name} +{re.escape(entry.summary)}$", text, re.MULTILINE), entry.name


def test_help_imports_nothing_heavy() -> None:
    """What makes it slow, told without a clock."""
    script = "import sys; from vmatrace.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"numpy", "pandas", "pyarrow", "bcc"} & set(done.stderr.split())


def test_first_screen_of_the_readme_has_the_two_commands() -> None:
    assert "make demo" in FIRST_SCREEN
    assert "make test" in FIRST_SCREEN


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_readme_lists_each_command(entry: CommandEntry) -> None:
    assert re.search(rf"^\| `vmatrace {entry.name}[ `]", README, re.MULTILINE)


def test_commands_in_the_readme_exist_with_their_options(vmatrace: Path) -> None:
    lines = COMMAND_LINE.findall(code_blocks())
    assert lines
    for line in lines:
        words = line.split(" -- ")[0].split("#")[0].split()
        if words[0].startswith("-"):
            continue
        sub = words[:2] if words[0] == "lab" else words[:1]
        text = help_of(vmatrace, *sub)
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{line}: no {option}"


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^(?:\$ |# )?make ([a-z-]+)", code_blocks(), re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
