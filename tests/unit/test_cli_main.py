"""How a command line ends: exit status, what stderr says, and what is left to the traced command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import vmatrace
from vmatrace import cli
from vmatrace.cli import common
from vmatrace.errors import BadTrace, CannotTrace, UsageError, VmatraceError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run main() with a stand-in for every command's module."""

    def run_main(command: Callable[..., object], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "load", lambda _entry: SimpleNamespace(command=command))
        status = cli.main(words)
        out, err = capfd.readouterr()
        return status, out, err

    return run_main


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_returned_status_is_the_exit_status(run: Run) -> None:
    assert run(lambda: 1, "replay") == (1, "", "")
    assert run(lambda: None, "replay") == (0, "", "")
    assert run(raising(typer.Exit(77)), "record") == (77, "", "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VmatraceError("x, y: z", exit_code=9), 9),
        (UsageError("x, y: z"), 2),
        (CannotTrace("x, y: z"), 3),
        (BadTrace("x, y: z"), 4),
    ],
)
def test_own_error_is_one_line_with_its_status(run: Run, error: VmatraceError, status: int) -> None:
    assert run(raising(error), "replay") == (status, "", "error: x, y: z\n")


def test_hint_follows_the_error(run: Run) -> None:
    _, _, err = run(raising(CannotTrace("bpf, here: not permitted", "become root")), "record")
    assert err == "error: bpf, here: not permitted\nhint: become root\n"


def test_control_characters_never_reach_the_terminal(run: Run) -> None:
    _, _, err = run(raising(BadTrace("evil\x1b[31m\nerror: forged, x: y")), "show")
    assert err == "error: evil\\033[31m\\012error: forged, x: y\n"


def test_traceback_only_with_vv(run: Run) -> None:
    assert "Traceback" not in run(raising(ValueError("odd")), "-v", "show")[2]
    assert "Traceback" in run(raising(ValueError("odd")), "-vv", "show")[2]
    assert "Traceback" in run(raising(ValueError("odd")), "show", "-vv")[2]


def test_our_own_fault_is_called_that(run: Run) -> None:
    status, _, err = run(raising(ValueError("odd")), "show")
    assert status == 4
    assert "internal, vmatrace show: ValueError: odd" in err
    assert "-vv" in err
    assert run(raising(ValueError("odd")), "doctor")[0] == 3


def test_system_error_names_the_file(run: Run) -> None:
    def command() -> None:
        Path("/nowhere/at/all").read_bytes()

    assert run(command, "show")[2] == "error: /nowhere/at/all: No such file or directory\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupt_is_130_and_says_nothing(run: Run, error: BaseException) -> None:
    assert run(raising(error), "timeline") == (130, "", "")


@pytest.mark.parametrize("words", [["nonsense"], ["--nonsense"], ["show", "--nonsense"], ["show", "a", "b"]])
def test_usage_error_is_2_with_a_hint(run: Run, words: list[str]) -> None:
    status, out, err = run(lambda: 0, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: usage, vmatrace")
    assert "hint: vmatrace" in err


def test_version(run: Run) -> None:
    assert run(lambda: 0, "--version") == (0, f"vmatrace {vmatrace.__version__}\n", "")


WORDS = [
    (["record", "--", "ls", "--help", "-v", "--", "-vv"], ["ls", "--help", "-v", "--", "-vv"]),
    (["record", "ls", "-l", "-v"], ["ls", "-l", "-v"]),
    (["record", "git", "-v", "--", "x"], ["git", "-v", "--", "x"]),
    (["record", "-v", "--", "", "a b", "$HOME", "\n"], ["", "a b", "$HOME", "\n"]),
]


@pytest.mark.parametrize(("words", "expected"), WORDS)
def test_words_of_the_traced_command_are_untouched(run: Run, words: list[str], expected: list[str]) -> None:
    seen: list[str] = []

    def command(cmd: list[str] = typer.Argument(None)) -> None:
        seen.extend(cmd)

    assert run(command, *words)[0] == 0
    assert seen == expected


def test_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m vmatrace --help | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_full_disk_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vmatrace", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.stderr == "error: stdout: No space left on device\n"
    assert done.returncode != 0


def test_json_takes_numpy_and_broken_names(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    common.print_json({"a": np.uint64(2**64 - 1), "b": {"y", "x"}, "name": "\udcff"})
    assert capsys.readouterr().out == '{"a": 18446744073709551615, "b": ["x", "y"], "name": "\\udcff"}\n'


def test_csv_escapes_and_joins(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_csv(["name", "flags", "none"], [{"name": "a\nb", "flags": ["READ", "WRITE"]}])
    assert capsys.readouterr().out == "name,flags,none\na\\012b,READ WRITE,\n"


def test_pipe_has_no_colour_and_does_not_wrap(capsys: pytest.CaptureFixture[str]) -> None:
    common.stdout_console().print("[bold]" + "x" * 1000, style="red")
    assert capsys.readouterr().out == "[bold]" + "x" * 1000 + "\n"
