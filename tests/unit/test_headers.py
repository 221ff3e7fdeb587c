"""The generated C: a header tree without kernel headers, constants from BTF, ranges from kallsyms."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmatrace.capture import headers
from vmatrace.errors import CannotTrace
from vmatrace.schema import KINDS, MISC

SYMBOLS = """ffffffff81000000 T _stext
ffffffff81000100 t vm_area_alloc
ffffffff81000180 t vm_area_alloc.cold
ffffffff81000200 T vm_area_dup
ffffffff81000200 T an_alias
ffffffff81000300 D vma_complete
ffffffff81000400 t remove_vma	[a_module]
ffffffff81000500 t last
"""


@dataclass
class Kernel:
    """A kernel's BTF as far as the headers ask: each member has a place of its own."""

    missing: frozenset[str] = frozenset()
    params: tuple[str, ...] = ("struct mm_struct *", "bool", "bool")
    asked: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)

    def offset(self, path: str) -> int:
        self.asked.append(path)
        if path in self.missing:
            raise CannotTrace(f"no member {path}")
        return 8 * len(self.asked)

    def member(self, struct: str, name: str) -> Any:
        path = f"{struct}.{name}"
        if path in self.missing:
            return None
        return SimpleNamespace(offset_bytes=self.offset(path), type_name=self.types.get(path, "u64"), size=8)

    def struct(self, name: str) -> Any:
        return SimpleNamespace(size=192)

    def tracepoint(self, name: str) -> Any:
        if name in self.missing:
            return None
        return SimpleNamespace(params=[SimpleNamespace(type_name=text) for text in self.params])


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes vmatrace_kernel.h for a made-up kernel; gives its #defines."""
    symbols = tmp_path / "kallsyms"
    symbols.write_text(SYMBOLS)
    found = headers.text_ranges
    monkeypatch.setattr(headers, "text_ranges", lambda names: found(names, symbols))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def make(kernel: Kernel) -> dict[str, str]:
        text = headers.kernel_constants(kernel, ring_pages=16, max_spaces=8)  # type: ignore[arg-type]
        return dict(re.findall(r"^#define (\w+(?:\(\w+\))?) (.+)$", text, re.M))

    return make


def test_the_tree_has_all_that_bcc_asks_for_and_repeats_nothing(tmp_path: Path) -> None:
    root = headers.header_tree(tmp_path)
    assert (root / "include/linux/kconfig.h").is_file()
    assert (root / "include/uapi/linux/bpf.h").read_text() == "", "bcc brings its own"
    for header in root.rglob("*.h"):
        for line in re.findall(r"#include <(.*)>", header.read_text()):
            assert (root / "include" / line).is_file(), f"{header} includes {line}"


def test_a_function_reaches_to_the_next_symbol(tmp_path: Path) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text(SYMBOLS)
    found = headers.text_ranges(["vm_area_alloc", "vm_area_dup", "vma_complete", "remove_vma", "nowhere"], symbols)
    assert found["vm_area_alloc"] == (0xFFFFFFFF81000100, 0x80)
    assert found["vm_area_dup"] == (0xFFFFFFFF81000200, 0x200), "neither an alias nor data ends it"
    assert found["remove_vma"] == (0xFFFFFFFF81000400, 0x100)
    assert set(found) == {"vm_area_alloc", "vm_area_dup", "remove_vma"}, "data is no function"


def test_the_last_symbol_has_some_length(tmp_path: Path) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text(SYMBOLS)
    assert headers.text_ranges(["last"], symbols)["last"][1] > 0


def test_hidden_addresses_are_told(tmp_path: Path) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text(re.sub(r"^\w{16}", "0" * 16, SYMBOLS, flags=re.M))
    with pytest.raises(CannotTrace, match="hidden") as raised:
        headers.text_ranges(["last"], symbols)
    assert "kptr_restrict" in raised.value.hint


def test_constants_come_from_the_kernel_at_hand(constants: Any) -> None:
    kernel = Kernel()
    found = constants(kernel)
    assert int(found["OFF_vma_vm_start"]) == 8 * (kernel.asked.index("vm_area_struct.vm_start") + 1)
    last = max(int(value) for name, value in found.items() if name.startswith("OFF_vma_"))
    assert int(found["VMA_READ_SIZE"]) == last + 8
    assert (found["RING_PAGES"], found["MAX_SPACES"]) == ("16", "8")
    assert found["TEXT_vm_area_alloc"] == "0xffffffff81000100ULL"
    assert found["SIZE_vm_area_alloc"] == "128ULL"
    assert found["SITE_merged(site)"] == "(0)", "absent: no call site fits"
    assert found["SITE_unmapped(site)"] == "((site) - 0xffffffff81000400ULL < 256ULL)"
    assert (found["TEXT_vma_lo"], found["TEXT_vma_span"]) == ("0xffffffff81000400ULL", "256ULL")


def test_kernels_with_lock_objects_tell_the_size_of_a_vma(constants: Any) -> None:
    assert "VMA_OBJECT_SIZE" not in constants(Kernel())
    found = constants(Kernel(types={"vm_area_struct.vm_lock": "struct vma_lock *"}))
    assert found["VMA_OBJECT_SIZE"] == "192"


def test_late_deaths_are_known_by_the_rcu_head_of_vmas() -> None:
    assert not headers.deaths_are_seen(Kernel())  # type: ignore[arg-type]
    assert headers.deaths_are_seen(Kernel(missing=frozenset({"vm_area_struct.vm_rcu"})))  # type: ignore[arg-type]


def test_what_a_kernel_may_lack_is_left_out(constants: Any) -> None:
    optional = frozenset(headers._OPTIONAL.values())
    found = constants(Kernel(missing=optional))
    assert not {f"OFF_{name}" for name in headers._OPTIONAL} & set(found)


@pytest.mark.parametrize("member", ["mm_struct.mm_mt", "maple_tree.ma_root", "vm_area_struct.vm_flags"])
def test_what_a_kernel_must_have_is_named(constants: Any, member: str) -> None:
    with pytest.raises(CannotTrace, match=member):
        constants(Kernel(missing=frozenset([member])))


def test_the_lock_hooks_arguments_are_found_with_and_without_a_path(constants: Any) -> None:
    assert constants(Kernel())["MMAP_LOCK_WRITE"] == "1"
    older = Kernel(params=("struct mm_struct *", "const char *", "bool", "bool"))
    assert constants(older)["MMAP_LOCK_WRITE"] == "2"
    with pytest.raises(CannotTrace, match="mmap_lock_acquire_returned"):
        constants(Kernel(missing=frozenset(["mmap_lock_acquire_returned"])))


def test_an_unknown_machine_is_refused(constants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    with pytest.raises(CannotTrace, match="sparc64"):
        constants(Kernel())


def test_events_are_the_schemas_own() -> None:
    text = headers.c_header()
    for name, value in KINDS.items():
        assert f"#define KIND_{name}\t{value}\n" in text
    assert f"#define FILE_BYTES\t{MISC['FILE_BYTES']}\n" in text
    names = re.findall(r"#define (\w+)", text)
    assert len(names) == len(set(names))
