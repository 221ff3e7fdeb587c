"""Attaching the decisions layer: one way after the other, what fails is named, everything is let go."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.btf_blob import BtfBlob
from vmatrace import btf
from vmatrace.btf import Btf
from vmatrace.capture import decisions, kernel_calls
from vmatrace.capture.decisions import Decisions, decisions_wanted
from vmatrace.capture.probe_trials import Trial
from vmatrace.errors import CannotTrace
from vmatrace.kernel.plan import Probe

NOT_SUPPORTED = 524


def kernel() -> Btf:
    b = BtfBlob()
    mm = b.ptr(b.struct("mm_struct", 8, [("map_count", b.ulong, 0)]))
    vma = b.ptr(b.struct("vm_area_struct", 200, [("vm_mm", mm, 128)]))
    for name in ("__split_vma", "vm_area_free", "do_brk_flags"):
        b.func(name, [("vma", vma), ("addr", b.ulong)])
    return btf.parse(b.blob())


def probe(name: str, what: str) -> Probe:
    return Probe(
        "decisions", "function", name, (name or "lost_one",), "", "gone", symbol=name, traceable=True, what=what
    )


PLAN = (
    probe("__split_vma", "SPLIT"),
    probe("", "SHRINK"),
    probe("vm_area_free", "VMA_FREE"),
    probe("do_brk_flags", "BRK"),
)


class Kernel:
    """Stands in for bpf(2) and perf_event_open(2): descriptors of /dev/null, refusals as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuse_trampolines: set[int] = set()
        self.refuse_kprobes: set[str] = set()
        self.open: list[int] = []
        self.order: list[tuple[str, bool]] = []
        self.btf = kernel()
        monkeypatch.setattr(kernel_calls, "load_program", self.load)
        monkeypatch.setattr(kernel_calls, "attach_program", lambda program: self.descriptor())
        monkeypatch.setattr(kernel_calls, "attach_kprobe", self.kprobe)

    def descriptor(self) -> int:
        fd = os.open("/dev/null", os.O_RDONLY)
        self.open.append(fd)
        return fd

    def load(self, kind: int, code: bytes, **more: Any) -> int:
        if kind == kernel_calls.TYPE_TRACING and more["target"] in self.refuse_trampolines:
            raise OSError(NOT_SUPPORTED, "Unknown error 524")
        return self.descriptor()

    def kprobe(self, symbol: str, program: int, *, at_return: bool) -> int:
        if symbol in self.refuse_kprobes:
            raise OSError(22, "Invalid argument")
        self.order.append((symbol, at_return))
        return self.descriptor()

    def still_open(self) -> list[int]:
        found = []
        for fd in self.open:
            try:
                os.fstat(fd)
                found.append(fd)
            except OSError:
                continue
        return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def layer(fake: Kernel, **more: Any) -> Decisions:
    program: Any = SimpleNamespace(code=lambda name: bytes(8))
    return Decisions(program, PLAN, fake.btf, **more)


def test_a_function_that_is_refused_is_never_fatal(fake: Kernel) -> None:
    fake.refuse_trampolines = {fake.btf.function_id(name) or 0 for name in ("vm_area_free", "do_brk_flags")}
    fake.refuse_kprobes = {"vm_area_free"}
    both = layer(fake)
    both.attach()
    header = both.header()
    assert [(each["function"], each["how"]) for each in header["probes"]] == [
        ("__split_vma", "fentry"),
        ("do_brk_flags", "kprobe"),
    ]
    assert header["how"] == "mixed"
    assert {gap["function"]: gap["reason"] for gap in header["missing"]} == {
        "lost_one": "inlined, not described by BTF, or not in this kernel",
        "vm_area_free": "fentry: ENOTSUPP (Unknown error 524); kprobe: EINVAL (Invalid argument)",
    }
    assert all(gap["lost"] == "gone" for gap in header["missing"])
    assert both.summary() == "decisions: 2 functions probed; not lost_one, vm_area_free"
    assert fake.order == [("do_brk_flags", True), ("do_brk_flags", False)], "no call without its return"
    both.close()
    assert not fake.still_open()


def test_what_was_begun_for_a_refused_function_is_let_go(fake: Kernel) -> None:
    fake.refuse_kprobes = {probe.symbol for probe in PLAN}
    both = layer(fake, ways=("kprobe",))
    assert not both.attach("auto")
    assert not both.attached
    with pytest.raises(CannotTrace, match="no function could be probed: kprobe: EINVAL"):
        layer(fake, ways=("kprobe",)).attach("decisions")
    assert len(both.missing) == len(PLAN)
    assert not fake.still_open()


def test_a_hook_without_its_struct_is_missing(fake: Kernel) -> None:
    program: Any = SimpleNamespace(code=lambda name: bytes(8))
    plan = (probe("ext4_file_mmap_prepare", "MMAP_PREPARE"), probe("__split_vma", "SPLIT"))
    both = Decisions(program, plan, fake.btf)
    both.attach()
    assert both.hooks() == [""]
    assert "no member vm_area_desc.mm" in both.missing[0].reason
    both.close()
    assert not fake.still_open()


@pytest.mark.parametrize(("layer", "works", "plan"), [("auto", False, 0), ("operations", True, 0), ("auto", True, 1)])
def test_auto_asks_once(monkeypatch: pytest.MonkeyPatch, layer: str, works: bool, plan: int) -> None:
    asked = []

    def try_all(probes: tuple[Probe, ...], _btf: Btf) -> tuple[Trial, ...]:
        asked.extend(probes)
        return tuple(Trial(each, "works" if works else "refused", "EPERM") for each in probes)

    monkeypatch.setattr(decisions, "try_all", try_all)
    monkeypatch.setattr(decisions, "function_names", lambda: ["__split_vma"])
    assert len([each for each in decisions_wanted(layer, kernel()) if each.name]) == plan
    assert len(asked) == (layer == "auto")


def test_decisions_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Trial(PLAN[0], "refused", "trampoline: EPERM (Operation not permitted)")
    monkeypatch.setattr(decisions, "try_all", lambda probes, _btf: (refused,))
    with pytest.raises(CannotTrace, match="EPERM") as raised:
        decisions_wanted("decisions", kernel())
    assert raised.value.exit_code == 3
