"""Arguments of probed functions, found by name in hand-made BTF, and how they get into a compiled program."""

from __future__ import annotations

import struct

import pytest

from tests.btf_blob import BtfBlob
from vmatrace import btf
from vmatrace.btf import Btf
from vmatrace.capture.decisions import with_parameters
from vmatrace.capture.parameters import BASE, NONE, PARAMETERS, decisions_header, parameters
from vmatrace.kernel.plan import Probe
from vmatrace.schema import DECISIONS, PROPOSAL_BITS


class Kernel:
    """A kernel's BTF in the making, with the types that prototypes need."""

    def __init__(self) -> None:
        self.blob = b = BtfBlob()
        self.int = b.int("int", 4)
        self.bool = b.int("bool", 1)
        self.mm = b.ptr(b.struct("mm_struct", 64, [("map_count", self.int, 0)]))
        self.vma = b.ptr(b.struct("vm_area_struct", 200, [("vm_start", b.ulong, 0), ("vm_mm", self.mm, 128)]))

    def parsed(self) -> Btf:
        return btf.parse(self.blob.blob())


def probe(name: str, what: str) -> Probe:
    return Probe("decisions", "function", name, (name,), "", "", symbol=name, traceable=True, what=what)


def values(kernel: Kernel, name: str, what: str, number: int = 0) -> dict[str, int]:
    return parameters(probe(name, what), number, kernel.parsed())


def test_an_argument_that_moved_is_found_by_its_name() -> None:
    for more in ([], ["anon_pgoff"]):
        k = Kernel()
        b = k.blob
        params = [("vmap", b.ptr(k.vma)), ("addr", b.ulong), ("len", b.ulong), ("pgoff", b.ulong)]
        params += [(name, b.ulong) for name in more] + [("need_rmap_locks", b.ptr(k.bool)), ("keep_source", k.bool)]
        b.func("copy_vma", params, k.vma)
        found = values(k, "copy_vma", "MERGE_COPIED")
        assert (found["START"], found["LENGTH"], found["PGOFF"]) == (1, 2, 3)
        assert found["KEEP_SOURCE"] == len(params) - 1
        assert found["ANON_PGOFF"] == (4 if more else NONE)
        assert (found["SOURCE"], found["SOURCE_BEHIND"]) == (0, 1), "a pointer to a pointer is followed"
        assert found["MM"] == NONE, "the task's own"
        assert found["RETURNS"] == 2


def test_an_argument_that_is_not_there_reads_as_none() -> None:
    k = Kernel()
    k.blob.func("vma_shrink", [("vmi", k.mm), ("vma", k.vma), ("end", k.blob.ulong)], k.int)
    found = values(k, "vma_shrink", "SHRINK", 7)
    assert (found["START"], found["END"], found["PGOFF"]) == (NONE, 2, NONE)
    assert (found["SOURCE"], found["RESULT"]) == (1, 1)
    assert (found["MM"], found["MM_BEHIND"], found["MM_OFFSET"]) == (1, 1, 16)
    assert (found["PROBE"], found["WHAT"], found["RETURNS"]) == (7, DECISIONS["SHRINK"], 1)


def test_structs_by_value_take_the_places_that_they_need() -> None:
    k = Kernel()
    b = k.blob
    context = b.struct("vm_userfaultfd_ctx", 8, [("ctx", b.ptr(0), 0)])
    params = [("mm", k.mm), ("prev", k.vma), ("addr", b.ulong), ("end", b.ulong), ("vm_flags", b.ulong)]
    params += [("anon_vma", b.ptr(0)), ("file", b.ptr(0)), ("pgoff", b.ulong), ("policy", b.ptr(0))]
    b.func("vma_merge", [*params, ("vm_userfaultfd_ctx", context), ("anon_name", b.ptr(0))], k.vma)
    found = values(k, "vma_merge", "MERGE_NEW")
    assert (found["UFFD"], found["NAME"], found["ARGUMENT_BYTES"]) == (9, 10, 88)
    assert (found["OLD_MERGE"], found["PREV"], found["MM"], found["MM_BEHIND"]) == (1, 1, 0, 0)


def test_a_copy_starts_from_the_source_and_is_looked_at_again() -> None:
    k = Kernel()
    k.blob.func("anon_vma_clone", [("dst", k.vma), ("src", k.vma)], k.int)
    k.blob.func("anon_vma_fork", [("vma", k.vma), ("pvma", k.vma)], k.int)
    for name, what in (("anon_vma_clone", "ANON_CLONE"), ("anon_vma_fork", "ANON_FORK")):
        found = values(k, name, what)
        assert (found["SOURCE"], found["RESULT"]) == (1, 0)
        assert found["MM"] == 1, "a child's own address space is not known yet"


def test_a_hook_in_a_module_needs_no_description() -> None:
    k = Kernel()
    k.blob.struct("vm_area_desc", 80, [("mm", k.mm, 64), ("start", k.blob.ulong, 128)])
    found = values(k, "xfs_file_mmap_prepare", "MMAP_PREPARE")
    assert (found["DESCRIPTOR"], found["ARGUMENT_BYTES"], found["RETURNS"]) == (0, 8, 1)
    assert (found["MM"], found["MM_BEHIND"], found["MM_OFFSET"]) == (0, 1, 8)


def test_offsets_and_bits_of_the_merge_struct() -> None:
    k = Kernel()
    b = k.blob
    state = b.enum("vma_merge_state", {"VMA_MERGE_START": 0, "VMA_MERGE_NOMERGE": 5, "VMA_MERGE_SUCCESS": 6})
    members = [("start", b.ulong, 0), ("vm_flags", b.ulong, 64), ("middle", k.vma, 128), ("state", state, 192)]
    bits = [("just_expand", k.bool, 1 << 24 | 256), ("skip_vma_uprobe", k.bool, 1 << 24 | 258)]
    b.struct("vma_merge_struct", 40, [*members, *bits], fields=True)
    text = decisions_header(k.parsed())
    for line in ("OFF_vmg_flags 8", "OFF_vmg_middle 16", "OFF_vmg_state 24", "VMG_READ_SIZE 40"):
        assert f"#define {line}\n" in text
    assert f"((v)[4] >> 0 & 1) * 1 | ((v)[4] >> 2 & 1) * {PROPOSAL_BITS['PROPOSAL_SKIP_UPROBE']}" in text
    assert "(raw) == 5 ? 2 : (raw) == 6 ? 3 : 0" in text, "states by their names, not their numbers"
    assert "OFF_vms_start" not in text
    assert "OFF_vmg_copied_from" not in text


def test_a_kernel_without_the_structs_has_a_header_too() -> None:
    text = decisions_header(Kernel().parsed())
    assert "vmg" not in text
    assert f"#define PARAMETER_{PARAMETERS[-1]} {len(PARAMETERS) - 1}\n" in text


def instruction(code: int, number: int) -> bytes:
    return struct.pack("<BBhI", code, 1, 0, number)


@pytest.mark.parametrize("name", ["PROBE", "RESULT_BEHIND"])
def test_parameters_are_written_where_the_program_waits_for_them(name: str) -> None:
    wanted = dict.fromkeys(PARAMETERS, 0) | {name: 42}
    place = BASE + PARAMETERS.index(name)
    others = [instruction(0xB7, 7), instruction(0xB7, BASE + len(PARAMETERS)), instruction(0x07, place)]
    patched = with_parameters(b"".join([*others, instruction(0xB7, place)]), wanted)
    assert patched == b"".join([*others, instruction(0xB7, 42)])
