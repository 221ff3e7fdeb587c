"""`vmatrace doctor` on the running kernel: what it says must be what the kernel does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmatrace import btf
from vmatrace.capture import kernel_calls, probe_trials
from vmatrace.capture.operations import TRACEPOINTS
from vmatrace.kernel.plan import operations_plan


def doctor(vmatrace: Path, *args: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, vmatrace, "doctor", *args], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def report(vmatrace: Path) -> dict[str, Any]:
    run = doctor(vmatrace, "--format", "json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert isinstance(found, dict)
    return found


def test_the_plan_is_what_the_recorder_attaches() -> None:
    names = {probe.name for probe in operations_plan(None) if probe.kind == "raw tracepoint"}
    assert names == set(TRACEPOINTS)


def test_the_operations_layer_works_here(report: dict[str, Any]) -> None:
    assert report["can_trace"] is True
    assert report["blocker"] is None
    assert report["layers"]["operations"]["state"] == "works"
    assert {probe["state"] for probe in report["layers"]["operations"]["probes"]} == {"works"}


def test_a_layer_that_the_kernel_refuses_is_not_called_working(report: dict[str, Any]) -> None:
    """Kprobes are there exactly if their event source is; a refused trampoline is then all there is."""
    kprobes = Path("/sys/bus/event_source/devices/kprobe").exists()
    for probe in report["layers"]["decisions"]["probes"]:
        if probe["state"] == "refused":
            assert ("not configured" in probe["reason"]) == (not kprobes)
            assert "trampoline: " in probe["reason"]
        assert probe["lost_without"]


def test_symbols_that_are_reported_missing_are_missing(report: dict[str, Any]) -> None:
    symbols = {line.split()[2].partition(".")[0] for line in Path("/proc/kallsyms").read_text().splitlines()}
    for probe in report["layers"]["decisions"]["probes"]:
        if probe["kind"] == "function" and "*" not in probe["wanted"][0]:
            assert (probe["state"] == "missing") == (not symbols & set(probe["wanted"]))


def trial_programs() -> int:
    """Compiled programs of the trials that exist now: the kernel lists them among its symbols."""
    return Path("/proc/kallsyms").read_text().count("_vmatrace_trial")


def test_nothing_stays_loaded(vmatrace: Path) -> None:
    before = trial_programs()
    program = probe_trials._load(kernel_calls.TYPE_RAW_TRACEPOINT)
    listed = trial_programs() > before
    os.close(program)
    if not listed:
        pytest.skip("this kernel does not list BPF programs among its symbols (net.core.bpf_jit_kallsyms)")
    assert doctor(vmatrace).returncode == 0
    assert trial_programs() == before


def test_the_text_names_layers_features_commits_and_limits(vmatrace: Path) -> None:
    run = doctor(vmatrace)
    for word in (
        "layer operations: works",
        "879bca0a2c4f",
        "max_map_count",
        "interpreter",
        "lockdown",
        "bcc",
    ):
        assert word in run.stdout
    assert "next: vmatrace record" in run.stderr


def test_without_root_it_says_so_and_exits_3(vmatrace: Path) -> None:
    drop = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    run = doctor(vmatrace, prefix=drop)
    assert run.returncode == 3
    assert run.stderr.startswith("error: permission, this machine: uid 65534")
    assert "hint: run it as root: sudo vmatrace doctor" in run.stderr
    assert "anon_merge_fix" in run.stdout, "what needs no root is still shown"


def test_without_capabilities_root_is_not_enough(vmatrace: Path) -> None:
    run = doctor(vmatrace, prefix=("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"))
    assert run.returncode == 3
    assert "permission, this machine: root, without" in run.stderr


@pytest.mark.parametrize(
    ("hidden", "complaint", "hint"),
    [
        ("/sys/kernel/btf", "BTF, this machine: /sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"),
        ("/usr/lib/python3/dist-packages", "bcc, this machine: not found", "python3-bpfcc"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    vmatrace: Path, hidden: str, complaint: str, hint: str
) -> None:
    hide = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh")
    run = doctor(vmatrace, prefix=hide)
    assert run.returncode == 3
    assert complaint in run.stderr
    assert hint in run.stderr


def test_layout_is_the_kernels_own(vmatrace: Path) -> None:
    run = doctor(vmatrace, "--layout", "--format", "json")
    assert run.returncode == 0
    layout = json.loads(run.stdout)
    size = Path("/sys/kernel/slab/vm_area_struct/object_size")
    if size.exists():
        assert layout["size"] == int(size.read_text())
        assert layout["objects_per_page"] == int((size.parent / "objs_per_slab").read_text())
    kernel = btf.load()
    for member in layout["members"]:
        assert kernel.offset(f"vm_area_struct.{member['name']}") == member["offset"]
    covered = set()
    for row in layout["members"] + layout["holes"]:
        covered |= set(range(row["offset"], row["offset"] + row["size"]))
    assert covered == set(range(layout["size"]))
    assert "6bef4c2f9722" in doctor(vmatrace, "--layout").stdout


def test_a_btf_file_is_read_in_place_of_the_kernel(vmatrace: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.btf"
    file.write_bytes(btf.KERNEL_BTF.read_bytes())
    run = doctor(vmatrace, "--btf", str(file), "--format", "json")
    assert run.returncode == 0
    assert json.loads(run.stdout)["features"]["vmg"]["value"] is True
    assert doctor(vmatrace, "--layout", "--btf", str(file)).returncode == 0
    file.write_bytes(file.read_bytes()[:1000])
    run = doctor(vmatrace, "--btf", str(file))
    assert run.returncode == 4
    assert run.stderr.startswith("error: BTF, ")
