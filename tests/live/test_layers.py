"""The layers on this kernel: decisions where functions can be probed, and said plainly where they cannot."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.recording import VMATRACE, record
from vmatrace.btf import Btf, load
from vmatrace.capture import kernel_calls
from vmatrace.capture.decisions import decisions_wanted, with_parameters
from vmatrace.capture.headers import function_names
from vmatrace.capture.operations import Operations
from vmatrace.capture.parameters import parameters
from vmatrace.kernel.functions import decisions_plan
from vmatrace.kernel.plan import Probe
from vmatrace.tracefile import TraceFile


@pytest.fixture(scope="module")
def btf() -> Btf:
    return load()


@pytest.fixture(scope="module")
def layer() -> Iterator[Operations]:
    both = Operations(decisions=True)
    yield both
    both.close()


def test_auto_takes_what_the_kernel_gives(tmp_path: Path, btf: Btf) -> None:
    possible = bool(decisions_wanted("auto", btf))
    assert record(tmp_path / "a.vmat", "true", options=("-q",)).status == 0
    header = TraceFile(tmp_path / "a.vmat").header
    assert header["layers"] == (["operations", "decisions"] if possible else ["operations"])
    assert ("decisions" in header) == possible


def test_without_the_layer_nothing_is_begun(tmp_path: Path, btf: Btf) -> None:
    if decisions_wanted("auto", btf):
        pytest.skip("this kernel lets functions be probed: tests/vm/decisions.py records them")
    recorded = record(tmp_path / "b.vmat", "touch", tmp_path / "ran", options=("--layer", "decisions"))
    assert recorded.status == 125, "vmatrace failed before the command"
    assert "error: decisions layer: this kernel lets no function be probed" in recorded.stderr
    assert "hint: record --layer operations" in recorded.stderr
    assert not (tmp_path / "b.vmat").exists()
    assert not (tmp_path / "ran").exists()
    words: list[str | Path] = [VMATRACE, "record", "--layer", "decisions", "-p", str(os.getpid())]
    words += ["-o", tmp_path / "c.vmat"]
    assert subprocess.run(words, capture_output=True, timeout=100, check=False).returncode == 3


def test_a_layer_that_does_not_exist(tmp_path: Path) -> None:
    recorded = record(tmp_path / "d.vmat", "true", options=("--layer", "all"))
    assert recorded.status == 2
    assert "error: --layer all: not known" in recorded.stderr


def functions() -> list[Probe]:
    return [probe for probe in decisions_plan(load(), function_names()) if probe.name]


def test_the_plan_finds_functions_here() -> None:
    assert {"MERGE_NEW", "MERGE_EXISTING", "SPLIT", "MMAP", "VMA_FREE"} <= {probe.what for probe in functions()}


@pytest.mark.parametrize("side", ["enter", "leave"])
def test_the_verifier_takes_the_programs_of_every_function(layer: Operations, btf: Btf, side: str) -> None:
    """As kprobe programs, which can be loaded where nothing can be attached: their code is that of trampolines."""
    for number, probe in enumerate(functions()):
        code = with_parameters(layer.program.code(f"{side}_kprobe"), parameters(probe, number, btf))
        os.close(kernel_calls.load_program(kernel_calls.TYPE_KPROBE, code))


def test_a_refused_program_is_explained() -> None:
    leave_without_answer = bytes([0x95, 0, 0, 0, 0, 0, 0, 0])
    with pytest.raises(OSError, match=r"the verifier: .*R0"):
        kernel_calls.load_program(kernel_calls.TYPE_KPROBE, leave_without_answer)
