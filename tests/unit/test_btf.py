"""The BTF reader on small hand-made blobs, on damaged ones, and on the running kernel's."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.btf_blob import UNION, BtfBlob
from vmatrace import btf
from vmatrace.errors import BadTrace, CannotTrace, VmatraceError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def sample() -> BtfBlob:
    b = BtfBlob()
    flag = b.int("bool", 1)
    ctx = b.struct("userfaultfd_ctx", 16, [])
    ctx_holder = b.struct("vm_userfaultfd_ctx", 8, [("ctx", b.ptr(ctx), 0)])
    flags = b.typedef("vm_flags_t", b.ulong)
    union = b.struct("", 8, [("vm_flags", b.const(flags), 0), ("__vm_flags", flags, 0)], UNION)
    bounds = b.struct("", 16, [("vm_start", b.ulong, 0), ("vm_end", b.ulong, 64)])
    b.struct(
        "vm_area_struct",
        64,
        [("", bounds, 0), ("", union, 128), ("vm_userfaultfd_ctx", ctx_holder, 256), ("seq", flags, 320)],
    )
    vmg = b.struct(
        "vma_merge_struct",
        16,
        [("start", b.ulong, 0), ("just_expand", flag, 1 << 24 | 64), ("give_up_on_oom", flag, 1 << 24 | 73)],
        fields=True,
    )
    b.func("vma_merge_new_range", [("vmg", b.ptr(vmg))], b.ptr(vmg))
    b.func("vma_modify_flags", [("vmi", b.ptr(0)), ("flags", flags), ("names", b.array(b.ulong, 3))])
    b.enum("vma_merge_state", {"VMA_MERGE_START": 0, "VMA_MERGE_ERROR_NOMEM": 1})
    b.enum("wide", {"BIG": 1 << 40, "MINUS": -2}, wide=True, signed=True)
    b.tracepoint("mmap_lock_released", [("mm", b.ptr(0)), ("write", flag)])
    b.tracepoint("mute", [("mm", b.ptr(vmg))], named=False)
    return b


def test_members_of_anonymous_parts_have_absolute_offsets() -> None:
    vma = btf.parse(sample().blob()).struct("vm_area_struct")
    offsets = {name: member.offset_bytes for name, member in vma.members.items()}
    assert offsets == {
        "vm_start": 0,
        "vm_end": 8,
        "vm_flags": 16,
        "__vm_flags": 16,
        "vm_userfaultfd_ctx": 32,
        "seq": 40,
    }
    assert vma.size == 64
    assert vma.members["vm_flags"].type_name == "const vm_flags_t"
    assert vma.members["vm_flags"].size == 8


def test_dotted_paths_reach_into_inner_structs() -> None:
    b = btf.parse(sample().blob())
    assert b.offset("vm_area_struct.vm_userfaultfd_ctx.ctx") == 32
    assert b.member("vm_area_struct", "vm_userfaultfd_ctx.nothing") is None
    assert b.member("vm_area_struct", "vm_start.below_a_number") is None
    with pytest.raises(CannotTrace, match=r"no member vm_area_struct\.vm_sequence"):
        b.offset("vm_area_struct.vm_sequence")
    with pytest.raises(CannotTrace, match="no struct mm_struct"):
        b.struct("mm_struct")


def test_bit_fields_tell_the_byte_and_the_bits() -> None:
    member = btf.parse(sample().blob()).member("vma_merge_struct", "give_up_on_oom")
    assert member is not None
    assert (member.offset_bytes, member.bit_offset, member.bit_size) == (9, 73, 1)


def test_prototypes() -> None:
    b = btf.parse(sample().blob())
    found = b.function("vma_modify_flags")
    assert found is not None
    assert [p.type_name for p in found.params] == ["void *", "vm_flags_t", "long unsigned int[3]"]
    assert [p.is_pointer for p in found.params] == [True, False, False]
    assert [p.size for p in found.params] == [8, 8, 24]
    assert found.param("flags") == 1
    assert found.param("keep_source") is None
    new_range = b.function("vma_merge_new_range")
    assert new_range is not None
    assert new_range.returns == "struct vma_merge_struct *"
    assert b.function("vma_merge") is None
    assert b.function("vm_area_struct") is None


def test_tracepoints_lose_their_data_argument_and_gain_names() -> None:
    b = btf.parse(sample().blob())
    found = b.tracepoint("mmap_lock_released")
    assert found is not None
    assert [p.name for p in found.params] == ["mm", "write"]
    mute = b.tracepoint("mute")
    assert mute is not None
    assert [(p.name, p.type_name) for p in mute.params] == [("", "struct vma_merge_struct *")]
    assert b.tracepoint("absent") is None
    assert b.tracepoints() == ("mmap_lock_released", "mute")


def test_enums_typedefs_and_names() -> None:
    b = btf.parse(sample().blob())
    assert b.enum("vma_merge_state") == {"VMA_MERGE_START": 0, "VMA_MERGE_ERROR_NOMEM": 1}
    assert b.enum("wide") == {"BIG": 1 << 40, "MINUS": -2}
    assert b.enum("none") is None
    assert b.typedef("vm_flags_t") == "long unsigned int"
    assert b.has_type("vma_merge_struct")
    assert not b.has_type("vm_area_desc")
    assert not b.has_type("")
    # A member's name is in the strings and yet names no type.
    assert not b.has_type("just_expand")
    assert b.functions() >= {"vma_modify_flags", "vma_merge_new_range"}


def test_a_name_shared_with_the_tail_of_a_longer_one_is_found() -> None:
    b = BtfBlob()
    b.name("my_vma")
    b._named["vma"] = b.strings.index(b"vma\0")
    b.struct("vma", 8, [])
    assert btf.parse(b.blob()).has_type("vma")


def test_the_other_byte_order() -> None:
    little = sample().blob()
    magic, version, flags, *rest = struct.unpack_from("<HBBIIIII", little)
    type_len = rest[2]
    words = struct.unpack_from(f"<{type_len // 4}I", little, 24)
    big = struct.pack(">HBBIIIII", magic, version, flags, *rest)
    big += struct.pack(f">{len(words)}I", *words) + little[24 + type_len :]
    assert btf.parse(big).offset("vm_area_struct.vm_end") == 8


def test_the_index_is_cached_privately_and_a_damaged_one_is_ignored(tmp_path: Path) -> None:
    blob = sample().blob()
    first = btf.parse(blob)
    (stored,) = (tmp_path / "vmatrace").iterdir()
    assert stored.stat().st_mode & 0o777 == 0o600
    assert len(btf.parse(blob)) == len(first)
    for garbage in (b"", b"abc", b"\0" * 40, b"\xff" * 40, stored.read_bytes()[:-4]):
        stored.write_bytes(garbage)
        assert btf.parse(blob).offset("vm_area_struct.vm_end") == 8


def test_a_cache_that_cannot_be_written_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert btf.parse(sample().blob()).has_type("vm_area_struct")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"\x9f\xeb\x01", "too few"),
        (b"ELF" * 20, "not BTF"),
        (b"\x9f\xeb\x02" + b"\0" * 40, "version 2"),
        (sample().blob()[:-1], "cut short"),
        (sample().blob()[:-1] + b"x", "zero byte"),
    ],
)
def test_what_is_not_btf_is_refused_with_a_reason(data: bytes, why: str) -> None:
    with pytest.raises(BadTrace, match=why) as caught:
        btf.parse(data, "FILE")
    assert str(caught.value).startswith("BTF, FILE: ")
    assert caught.value.hint


def test_unknown_kinds_and_records_past_the_end_are_refused() -> None:
    b = BtfBlob()
    b.add("odd", 31, 0, 0)
    with pytest.raises(BadTrace, match="kind 31"):
        btf.parse(b.blob())
    b = BtfBlob()
    b.add("short", 4, 5, 8)
    with pytest.raises(BadTrace, match="past the end"):
        btf.parse(b.blob())


def test_loops_are_refused_not_followed() -> None:
    b = BtfBlob()
    b.typedef("me", 2)
    b.struct("self", 8, [("", 3, 0)])
    b.func("uses", [("x", 2)])
    found = btf.parse(b.blob())
    with pytest.raises(BadTrace, match="itself"):
        found.struct("self")
    with pytest.raises(BadTrace, match="itself"):
        found.function("uses")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="no such file"):
        btf.load(tmp_path / "none")
    with pytest.raises(BadTrace, match="directory"):
        btf.load(tmp_path)
    with pytest.raises(BadTrace, match="empty"):
        btf.load("/dev/null")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_gives_an_error_or_an_answer_and_never_a_crash(data: st.DataObject) -> None:
    blob = bytearray(sample().blob())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob)))
    raw = bytes(blob[:cut]) if data.draw(st.booleans()) else bytes(blob)
    with contextlib.suppress(VmatraceError):
        found = btf.parse(raw)
        for name in ("vm_area_struct", "vma_merge_struct", "vm_flags_t"):
            found.find_struct(name)
            found.member(name, "vm_userfaultfd_ctx.ctx")
            found.typedef(name)
        for name in ("vma_modify_flags", "vma_merge_new_range"):
            found.function(name)
        found.tracepoint("mmap_lock_released")
        found.tracepoints()
        found.enum("wide")


needs_btf = pytest.mark.skipif(not btf.KERNEL_BTF.exists(), reason="the running kernel has no BTF")


@needs_btf
def test_the_running_kernel_is_read_with_and_without_its_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = btf.load().struct("vm_area_struct")
    assert len(list(tmp_path.rglob("btf-*.index"))) == 1
    assert btf.load().struct("vm_area_struct") == first
    assert btf.load().offset("vm_area_struct.vm_end") == 8


@needs_btf
def test_what_every_kernel_with_maple_trees_has() -> None:
    kernel = btf.load()
    page = os.sysconf("SC_PAGE_SIZE")
    assert kernel.pointer_size == struct.calcsize("P")
    assert 0 < kernel.struct("vm_area_struct").size < page
    assert kernel.offset("mm_struct.mm_mt.ma_root") > 0
    released = kernel.tracepoint("mmap_lock_released")
    assert released is not None
    assert released.params[0].type_name == "struct mm_struct *"
    exit_mmap = kernel.function("exit_mmap")
    assert exit_mmap is not None
    assert exit_mmap.params[0].is_pointer
    states = kernel.enum("maple_type")
    assert states is not None
    assert states["maple_leaf_64"] == 1
