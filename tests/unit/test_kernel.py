"""Features, rule sets, detectors, profiles, the probe plan and layouts, on hand-made BTF."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.btf_blob import UNION, BtfBlob
from vmatrace import btf
from vmatrace.btf import Btf
from vmatrace.errors import BadTrace, UsageError
from vmatrace.kernel import (
    FEATURES,
    NAMED,
    Commit,
    Finding,
    KernelProfile,
    detect,
    detect_config,
    nearest_release,
    read_profile,
    rule_set,
)
from vmatrace.kernel.functions import decisions_plan, mmap_prepare_hooks
from vmatrace.kernel.layout import struct_layout
from vmatrace.kernel.plan import operations_plan


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


# ---- the table


def test_a_commit_is_cited_in_the_projects_form() -> None:
    commit = Commit("64212ba02e66", "mm: implement sticky VMA flags", "v6.19")
    assert str(commit) == 'Linux kernel commit 64212ba02e66 ("mm: implement sticky VMA flags") (in v6.19)'


@pytest.mark.parametrize("feature", FEATURES.values(), ids=lambda feature: feature.id)
def test_every_feature_is_well_formed(feature: Any) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", feature.id)
    assert feature.summary
    assert feature.sign
    assert feature.since
    if feature.commit is not None:
        assert re.fullmatch(r"[0-9a-f]{12}", feature.commit.id)
        assert re.fullmatch(r"v\d+\.\d+", feature.commit.version)
        assert feature.commit.subject == feature.commit.subject.strip() != ""


def test_no_commit_is_cited_under_two_subjects() -> None:
    commits = [feature.commit for feature in FEATURES.values() if feature.commit is not None]
    assert len({commit.id for commit in commits}) == len(commits)


def test_the_ten_changes_that_switch_anything_have_a_feature() -> None:
    cited = {feature.commit.id for feature in FEATURES.values() if feature.commit is not None}
    assert cited >= {
        "bb666b7c2707",
        "081056dc00a2",
        "ee40c9920ac2",
        "c84bf6dd2b83",
        "3e43e260f1e4",
        "dd7a6246f4fd",
        "6c36ac1e124f",
        "879bca0a2c4f",
        "3104138517fc",
        "6bef4c2f9722",
    }


# ---- rule sets


def test_the_named_releases_in_order() -> None:
    assert list(NAMED) == ["6.1", "6.6", "6.12", "6.16", "6.17", "6.18", "6.19", "7.0", "7.1", "7.2", "7.3"]
    assert {name for name, found in NAMED.items() if found.label == "read"} == {"6.6"}
    assert all(set(found.features) == set(FEATURES) for found in NAMED.values())
    assert not any(found.unknown for found in NAMED.values())


@pytest.mark.parametrize(
    ("feature", "first", "last"),
    [
        ("close_only_deleted", "6.6", None),
        ("mprotect_drops_account", "6.12", None),
        ("map_stack_nohuge", "6.12", None),
        ("vmg", "6.12", None),
        ("anon_merge_fix", "6.16", None),
        ("mmap_prepare", "6.16", None),
        ("early_ksm_flag", "6.17", None),
        ("multi_vma_mremap", "6.17", None),
        ("desc_vm_file", "6.18", None),
        ("copied_from", "6.19", None),
        ("sticky_flags", "6.19", None),
        ("compat_assigns_flags", "7.0", None),
        ("mremap_count_7_1", "7.1", None),
        ("anon_pgoff", "7.3", None),
        ("dontunmap_drops_account", "6.16", "6.17"),
    ],
)
def test_a_feature_is_in_the_releases_that_have_it(feature: str, first: str, last: str | None) -> None:
    names = list(NAMED)
    until = names.index(last) if last else len(names)
    expected = [name for i, name in enumerate(names) if names.index(first) <= i <= until]
    assert [name for name in names if NAMED[name].has(feature)] == expected


def test_features_are_added_and_removed_by_name() -> None:
    changed = rule_set("6.18+copied_from+sticky_flags-multi_vma_mremap")
    assert changed.name == "6.18+copied_from+sticky_flags-multi_vma_mremap"
    assert changed.has("copied_from")
    assert changed.has("sticky_flags")
    assert not changed.has("multi_vma_mremap")
    assert changed.has("vmg")
    assert changed.label == "measured"
    assert not NAMED["6.18"].has("copied_from"), "the named set itself stays as it is"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("6.18.44", "stable kernels mix features", "say 6.18"),
        ("6.14", "not a known name", "the nearest is 6.1"),
        ("5.4", "not a known name", "the nearest is 6.1"),
        ("9.9", "not a known name", "the nearest is 7.3"),
        ("v6.18", "not a known name", "the nearest is 6.18"),
        ("", "not a known name", "known: 6.1"),
        ("nonsense", "not a known name", "known: 6.1"),
        ("auto", "no trace", "6.1"),
        ("6.18+copyed_from", "not a known feature", "copied_from"),
        ("6.18+", "not a known feature", "doctor"),
        ("6.18+zzzzzz", "not a known feature", "doctor"),
    ],
)
def test_names_that_are_not_known_are_refused_with_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        rule_set(text)
    assert caught.value.hint is not None
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_auto_is_the_given_set_and_can_be_edited() -> None:
    auto = NAMED["7.0"].changed("auto")
    assert rule_set("auto", auto) is auto
    assert rule_set("auto-vmg", auto).name == "auto-vmg"
    assert not rule_set("auto-vmg", auto).has("vmg")


def test_an_unknown_feature_counts_as_absent_and_has_two_variants() -> None:
    unsure = NAMED["6.18"].changed(vmg=None, mseal=None)
    assert not unsure.has("vmg")
    assert unsure.unknown == ("mseal", "vmg")
    decided = list(unsure.variants(("vmg",)))
    assert [found.has("vmg") for found in decided] == [False, True]
    assert len(list(unsure.variants())) == 4
    assert not any(found.unknown for found in unsure.variants())
    with pytest.raises(KeyError):
        unsure.has("no_such_feature")


@pytest.mark.parametrize("name", list(NAMED))
def test_a_release_is_nearest_to_itself(name: str) -> None:
    found, edits = nearest_release(NAMED[name].features)
    assert edits == ()
    assert NAMED[found].features == NAMED[name].features


def test_a_stable_kernel_grew_from_the_release_before_its_backports() -> None:
    stable = NAMED["6.18"].changed(copied_from=True, sticky_flags=True, guard_av_anon_only=True)
    assert nearest_release(stable.features) == (
        "6.18",
        ("+copied_from", "+sticky_flags", "+guard_av_anon_only"),
    )
    fixed = NAMED["6.16"].changed(dontunmap_drops_account=False)
    assert nearest_release(fixed.features) == ("6.16", ("-dontunmap_drops_account",))
    unsure = NAMED["7.0"].changed(droppable=None, mseal=None)
    assert nearest_release(unsure.features) == ("7.0", ())


# ---- detectors, on kernels described by hand


def kernel_6_1() -> BtfBlob:
    b = BtfBlob()
    vma = b.struct("vm_area_struct", 200, [("shared", b.ulong, 256), ("vm_file", b.ulong, 1024)])
    b.struct("mm_struct", 1024, [("mm_mt", b.ulong, 64)])
    b.func("__vma_adjust", [("vma", b.ptr(vma)), ("start", b.ulong)])
    b.func("vma_merge", [("mm", b.ptr(0))])
    b.func("is_mergeable_anon_vma", [("av1", b.ptr(0)), ("av2", b.ptr(0)), ("vma", b.ptr(vma))])
    b.func("copy_vma", [("vmap", b.ptr(0)), ("keep_source", b.ulong)])
    b.tracepoint("exit_mmap", [("mm", b.ptr(0))])
    return b


def kernel_7_1(pointer: bool = True) -> BtfBlob:
    b = BtfBlob()
    flags = b.struct("", 8, [("__vma_flags", b.ulong, 0)])
    wide = b.typedef("vma_flags_t", flags)
    vma = b.struct(
        "vm_area_struct",
        192,
        [
            ("vm_file", b.ulong, 704),
            ("vm_refcnt", b.ulong, 1024),
            ("vm_freeptr", b.ulong, 0),
            ("shared", b.ulong, 1088),
        ],
    )
    vmg = b.struct(
        "vma_merge_struct",
        96,
        [("middle", b.ptr(vma), 0), ("target", b.ptr(vma), 64), ("copied_from", b.ptr(vma), 128)],
    )
    b.struct("vm_area_desc", 96, [("vm_file", b.ulong, 0), ("action", b.ulong, 64), ("vma_flags", wide, 128)])
    b.struct("file_operations", 256, [("mmap_prepare", b.ptr(0), 0)])
    b.struct("vm_operations_struct", 128, [("mapped", b.ptr(0), 0)])
    parameter = b.ptr(wide) if pointer else b.ulong
    b.func("vma_modify_flags", [*((f"p{i}", b.ulong) for i in range(5)), ("flags", parameter)])
    b.func("copy_vma", [("vmap", b.ptr(0)), ("addr", b.ulong)])
    b.func("vma_merge_new_range", [("vmg", b.ptr(vmg))])
    return b


def values(blob: BtfBlob) -> dict[str, bool | None]:
    return {key: found.value for key, found in detect(btf.parse(blob.blob())).items()}


def test_an_old_kernel() -> None:
    found = values(kernel_6_1())
    absent = {key for key, value in found.items() if value is False}
    assert {"munmap_new_outside", "close_only_deleted", "vmg", "anon_merge_fix", "sticky_flags"} <= absent
    assert {
        "mmap_prepare",
        "copied_from",
        "wide_flags",
        "vma_layout_packed",
        "mseal",
        "mseal_per_vma",
    } <= absent
    assert found["no_dontunmap_self_merge"] is True, "found by the parameter's name, a backport"
    assert found["mprotect_drops_account"] is None
    assert found["hugetlb_unshare_in_split"] is None


def test_a_new_kernel() -> None:
    found = values(kernel_7_1())
    present = {key for key, value in found.items() if value}
    assert {"munmap_new_outside", "close_only_deleted", "vmg", "vmg_target", "anon_merge_fix"} <= present
    assert {"mmap_prepare", "copied_from", "sticky_flags", "wide_flags", "mremap_count_7_1"} <= present
    assert {"desc_vm_file", "desc_action", "desc_vma_flags", "compat_assigns_flags"} <= present
    assert {"vm_refcnt", "vma_typesafe", "vma_layout_packed"} <= present
    assert found["no_dontunmap_self_merge"] is False
    assert found["anon_pgoff"] is False


def test_the_sixth_parameter_tells_sticky_from_plain_flags() -> None:
    found = values(kernel_7_1(pointer=False))
    assert found["sticky_flags"] is False
    assert found["wide_flags"] is False


def test_the_anon_vma_test_outweighs_the_structs_where_it_is_there() -> None:
    blob = kernel_7_1()
    blob.func("is_mergeable_anon_vma", [("av1", blob.ulong), ("av2", blob.ulong), ("vma", blob.ulong)])
    assert values(blob)["anon_merge_fix"] is False


def test_every_detector_names_its_sign_and_silence_is_unknown() -> None:
    for found in detect(btf.parse(kernel_7_1().blob())).values():
        assert found.detector.startswith("BTF")
    empty = detect(None)
    assert set(empty) == set(FEATURES)
    assert {found.value for found in empty.values()} == {None}
    assert {found.detector for found in detect_config(None).values()} == {"no BTF"}


# ---- profiles


def test_behaviour_wins_over_btf_and_a_contradiction_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = btf.parse(kernel_7_1().blob())
    seen = {
        "droppable": Finding(True, "behaviour: works"),
        "copied_from": Finding(False, "behaviour: 4"),
        "sticky_flags": Finding(True, "behaviour: gu"),
        "wide_flags": Finding(None, "behaviour: cannot tell"),
        "soft_dirty": Finding(False, "behaviour: no sd"),
    }
    profile = read_profile(kernel, seen)
    assert profile.features["droppable"] == Finding(True, "behaviour: works")
    assert profile.features["copied_from"].value is False
    assert (
        "against BTF: member vma_merge_struct.copied_from present" in profile.features["copied_from"].detector
    )
    assert profile.features["sticky_flags"].detector.startswith("BTF")
    assert profile.features["wide_flags"].value is True
    assert profile.config["soft_dirty"].value is False
    assert profile.rule_set().has("droppable")
    assert not profile.rule_set().has("copied_from")


def test_a_profile_survives_json() -> None:
    profile = read_profile(btf.parse(kernel_6_1().blob())).with_probes({"ma_write": "works"})
    copy = KernelProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert copy == profile
    assert copy.rule_set().features == profile.rule_set().features
    assert copy.limits["stack_guard_gap"] is not None
    assert copy.page_size in (4096, 16384, 65536)


def test_a_profile_of_another_version_is_read() -> None:
    data = read_profile(btf.parse(kernel_6_1().blob())).to_dict()
    data["features"]["from_the_future"] = {"value": True, "detector": "x"}
    del data["features"]["vmg"]
    profile = KernelProfile.from_dict(data)
    assert profile.rule_set().features["vmg"] is None
    assert "from_the_future" not in profile.rule_set().features
    assert profile.to_dict()["features"]["from_the_future"]["value"] is True


@pytest.mark.parametrize(
    "damage",
    [
        {"page_size": 0},
        {"page_size": 4097},
        {"page_size": "x"},
        {"features": {"vmg": {"value": "yes", "detector": ""}}},
        {"features": {"vmg": {}}},
        {"features": None},
        {"limits": {"max_map_count": "many"}},
    ],
)
def test_a_damaged_profile_is_refused(damage: dict[str, Any]) -> None:
    data = read_profile(btf.parse(kernel_6_1().blob())).to_dict()
    with pytest.raises(BadTrace, match="kernel profile"):
        KernelProfile.from_dict({**data, **damage})
    with pytest.raises(BadTrace, match="KeyError"):
        KernelProfile.from_dict({})


# ---- the plan


def parsed(blob: BtfBlob) -> Btf:
    return btf.parse(blob.blob())


def test_the_plan_takes_what_the_kernel_has() -> None:
    old = decisions_plan(parsed(kernel_6_1()), ["vma_merge", "__vma_adjust", "copy_vma"])
    by_use = {probe.what: probe for probe in old}
    assert by_use["MERGE_NEW"].name == "vma_merge"
    assert "MERGE_EXISTING" not in by_use, "the same function shows both"
    assert by_use["MERGE_COPIED"].name == "copy_vma"
    assert by_use["SPLIT"].name == ""
    assert "MERGE_EXTEND" not in by_use, "a kernel without vma_merge_struct has no such decision"
    assert "MMAP_PREPARE" not in by_use
    described = kernel_7_1()
    described.func("vma_shrink", [("vma", described.ulong)])
    new = decisions_plan(
        parsed(described),
        ["vma_merge_new_range", "vma_shrink.constprop.0", "ext4_file_mmap_prepare"],
    )
    found = {probe.name: probe for probe in new if probe.name}
    assert found["vma_merge_new_range"].traceable
    assert found["vma_shrink"].symbol == "vma_shrink.constprop.0"
    assert not found["vma_shrink"].traceable
    assert found["ext4_file_mmap_prepare"].what == "MMAP_PREPARE"


@pytest.mark.parametrize("hidden", ["__split_vma", "vma_modify", "ext4_file_mmap_prepare"])
def test_an_invisible_function_is_named_with_what_is_lost(hidden: str) -> None:
    symbols = {"__split_vma", "vma_modify", "ext4_file_mmap_prepare"}
    known = {probe.what: probe for probe in decisions_plan(None, symbols)}
    plan = {probe.what: probe for probe in decisions_plan(None, symbols - {hidden})}
    assert {what for what, probe in plan.items() if probe.name != known[what].name} == {
        what for what, probe in known.items() if probe.name == hidden
    }
    assert all(probe.lost and probe.wanted for probe in plan.values())


def test_a_function_without_a_description_is_not_guessed_at() -> None:
    symbols = ["vma_merge_new_range", "vma_modify", "ext4_file_mmap_prepare"]
    plan = {probe.what: probe for probe in decisions_plan(parsed(kernel_7_1()), symbols)}
    assert plan["MERGE_NEW"].traceable
    assert plan["MERGE_EXISTING"].name == "", "which of its arguments is what is not known"
    assert plan["MMAP_PREPARE"].name, "a hook has one argument only"


def test_a_hook_that_only_btf_knows_is_missed() -> None:
    kernel = kernel_7_1()
    kernel.func("shmem_mmap_prepare", [("desc", kernel.ptr(0))])
    plan = decisions_plan(parsed(kernel), ["ext4_file_mmap_prepare"])
    assert [(probe.name, probe.wanted) for probe in plan if probe.what == "MMAP_PREPARE"] == [
        ("ext4_file_mmap_prepare", ("ext4_file_mmap_prepare",)),
        ("", ("shmem_mmap_prepare",)),
    ]


def test_an_exact_symbol_is_preferred_to_a_suffixed_one() -> None:
    for symbols in (["vma_expand", "vma_expand.isra.0"], ["vma_expand.isra.0", "vma_expand"]):
        (probe,) = [probe for probe in decisions_plan(None, symbols) if probe.name == "vma_expand"]
        assert probe.symbol == "vma_expand"


@pytest.mark.parametrize("piece", ["vma_expand.cold", "vma_expand.part.0", "vma_expand.isra.0.cold"])
def test_a_piece_of_a_function_is_not_the_function(piece: str) -> None:
    assert not [probe for probe in decisions_plan(None, [piece]) if probe.name]


def test_mmap_prepare_hooks_by_name() -> None:
    names = [
        "ext4_file_mmap_prepare",
        "mmap_zero_prepare",
        "mmap_action_prepare",
        "compat_vma_mmap_prepare",
        "__pfx_ext4_file_mmap_prepare",
        "hugetlb_file_mmap_prepare_success",
    ]
    assert mmap_prepare_hooks(names) == ("ext4_file_mmap_prepare", "mmap_zero_prepare")


def test_tracepoints_that_btf_does_not_list_are_missing() -> None:
    plan = operations_plan(parsed(kernel_6_1()))
    assert [probe.name for probe in plan if probe.kind == "raw tracepoint" and probe.name] == ["exit_mmap"]
    assert all(probe.name for probe in operations_plan(None)), "without BTF each is tried"


# ---- layouts


def test_a_layout_tells_holes_lines_and_cost() -> None:
    b = BtfBlob()
    flag = b.int("bool", 1)
    union = b.struct("", 8, [("vm_flags", b.ulong, 0), ("__vm_flags", b.ulong, 0)], UNION)
    members = [("vm_start", b.ulong, 0), ("", union, 128), ("detached", flag, 192), ("tail", b.ulong, 640)]
    b.struct("vm_area_struct", 136, members)
    layout = struct_layout(parsed(b))
    assert [(row.offset, row.size) for row in layout.holes] == [(8, 8), (25, 55), (88, 48)]
    assert [row.name for row in layout.rows if row.name] == [
        "vm_start",
        "vm_flags",
        "__vm_flags",
        "detached",
        "tail",
    ]
    assert [row.line for row in layout.rows if row.name] == [0, 0, 0, 0, 1]
    assert layout.lines == 3
    assert (layout.objects_per_page, layout.pages_per_1000, layout.bytes_per_1000) == (21, 48, 196608)
    assert struct_layout(parsed(b), page_size=16384).objects_per_page == 85


def test_bit_fields_in_a_layout_take_their_bytes_only() -> None:
    b = BtfBlob()
    flag = b.int("bool", 1)
    members = [
        ("start", b.ulong, 0),
        ("a", flag, 1 << 24 | 64),
        ("b", flag, 1 << 24 | 65),
        ("c", flag, 9 << 24 | 66),
    ]
    b.struct("vma_merge_struct", 16, members, fields=True)
    layout = struct_layout(parsed(b), "vma_merge_struct")
    assert [(row.offset, row.size) for row in layout.rows if row.name in ("a", "b", "c")] == [
        (8, 1),
        (8, 1),
        (8, 2),
    ]
    assert [(row.offset, row.size) for row in layout.holes] == [(10, 6)]
