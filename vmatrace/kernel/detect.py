"""Finds the features of a kernel in its BTF: one detector per feature, none by version number.

What BTF cannot tell stays unknown here; `vmatrace.fingerprint` finds much of that by behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmatrace.btf import Btf
from vmatrace.kernel.features import FEATURES


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one feature: True, False or None (unknown), and which detector said so."""

    value: bool | None
    detector: str


Detector = Callable[[Btf], Finding]
UNKNOWN = Finding(None, "BTF has no sign of it")


def _member(struct: str, member: str) -> Detector:
    def detector(btf: Btf) -> Finding:
        found = btf.member(struct, member) is not None
        return Finding(found, f"BTF: member {struct}.{member} {_present(found)}")

    return detector


def _struct(name: str) -> Detector:
    def detector(btf: Btf) -> Finding:
        found = btf.find_struct(name) is not None
        return Finding(found, f"BTF: struct {name} {_present(found)}")

    return detector


def _any_function(*names: str) -> Detector:
    def detector(btf: Btf) -> Finding:
        found = [name for name in names if btf.function(name) is not None]
        if found:
            return Finding(True, f"BTF: function {found[0]} present")
        return Finding(False, f"BTF: no function {' or '.join(names)}")

    return detector


def _present(found: bool) -> str:
    return "present" if found else "absent"


def _old_adjust_gone(btf: Btf) -> Finding:
    gone = btf.function("__vma_adjust") is None
    return Finding(gone, f"BTF: function __vma_adjust {_present(not gone)}")


def _close_only_deleted(btf: Btf) -> Finding:
    if btf.find_struct("vma_merge_struct") is not None:
        return Finding(True, "BTF: struct vma_merge_struct present, which came later")
    if btf.function("__vma_adjust") is not None:
        return Finding(False, "BTF: function __vma_adjust present, which went earlier")
    return UNKNOWN


def _mseal(btf: Btf) -> Finding:
    calls = ("do_mseal", "mseal_apply", "__do_sys_mseal", "__x64_sys_mseal", "__arm64_sys_mseal")
    return _any_function(*calls)(btf)


def _mseal_per_vma(btf: Btf) -> Finding:
    if not _mseal(btf).value:
        return Finding(False, "BTF: no function of mseal")
    return _struct("vma_merge_struct")(btf)


def _packed_layout(btf: Btf) -> Finding:
    file, shared = btf.member("vm_area_struct", "vm_file"), btf.member("vm_area_struct", "shared")
    if file is None or shared is None:
        return UNKNOWN
    behind = shared.offset_bytes > file.offset_bytes
    where = "behind" if behind else "before"
    return Finding(behind, f"BTF: vm_area_struct.shared lies {where} vm_file")


def _unshare_in_split(btf: Btf) -> Finding:
    if btf.function("hugetlb_split") is not None:
        return Finding(True, "BTF: function hugetlb_split present")
    if btf.function("hugetlb_vm_op_split") is not None:
        return Finding(False, "BTF: hugetlb_vm_op_split without hugetlb_split")
    return Finding(None, "BTF: no function of hugetlb's split: not configured, or inlined")


def _copy_vma_undo(btf: Btf) -> Finding:
    if btf.function("fixup_hugetlb_reservations") is not None:
        return Finding(True, "BTF: function fixup_hugetlb_reservations present")
    return Finding(None, "BTF: no function fixup_hugetlb_reservations: absent, or inlined")


def _anon_merge_fix(btf: Btf) -> Finding:
    check = btf.function("is_mergeable_anon_vma")
    if check is not None:
        count = len(check.params)
        return Finding(count == 2, f"BTF: is_mergeable_anon_vma takes {count} parameters")
    middle = btf.member("vma_merge_struct", "middle") is not None
    desc = btf.find_struct("vm_area_desc") is not None
    text = f"BTF: vma_merge_struct.middle {_present(middle)}, struct vm_area_desc {_present(desc)}"
    return Finding(middle and desc, text)


def _mmap_prepare(btf: Btf) -> Finding:
    if btf.find_struct("vm_area_desc") is None:
        return Finding(False, "BTF: struct vm_area_desc absent")
    return _member("file_operations", "mmap_prepare")(btf)


def _wide_descriptor(btf: Btf) -> Finding:
    new = btf.member("vm_area_desc", "vma_flags") is not None
    old = btf.member("vm_area_desc", "vm_flags") is not None
    text = f"BTF: vm_area_desc.vma_flags {_present(new)}, vm_area_desc.vm_flags {_present(old)}"
    return Finding(new and not old, text)


def _same_release(detector: Detector) -> Detector:
    """A sign that is not the feature's own, but that came in the same release."""

    def marked(btf: Btf) -> Finding:
        found = detector(btf)
        return Finding(found.value, found.detector + " (marks the same release)")

    return marked


def _modify_flags_argument(btf: Btf, wanted: Callable[[str, bool], bool]) -> Finding:
    function = btf.function("vma_modify_flags")
    if function is None or len(function.params) < 6:
        if btf.find_struct("vma_merge_struct") is None:
            return Finding(False, "BTF: neither vma_modify_flags nor struct vma_merge_struct")
        return Finding(None, "BTF: vma_modify_flags is not described")
    param = function.params[5]
    return Finding(
        wanted(param.type_name, param.is_pointer),
        f"BTF: 6th parameter of vma_modify_flags is {param.type_name}",
    )


def _sticky(btf: Btf) -> Finding:
    return _modify_flags_argument(btf, lambda _name, is_pointer: is_pointer)


def _wide_flags(btf: Btf) -> Finding:
    return _modify_flags_argument(btf, lambda name, _is_pointer: name == "vma_flags_t *")


def _keep_source(btf: Btf) -> Finding:
    function = btf.function("copy_vma")
    if function is None:
        return Finding(None, "BTF: copy_vma is not described")
    found = function.param("keep_source") is not None
    return Finding(found, f"BTF: copy_vma's parameter keep_source {_present(found)}")


_exec_in_mm = _any_function("create_init_stack_vma")

_DETECTORS: Mapping[str, Detector] = {
    "munmap_new_outside": _old_adjust_gone,
    "ksm_opt_in": _any_function("ksm_add_vma", "ksm_vma_flags"),
    "close_only_deleted": _close_only_deleted,
    "mseal": _mseal,
    "mseal_per_vma": _mseal_per_vma,
    "vmg": _struct("vma_merge_struct"),
    "vmg_target": _member("vma_merge_struct", "target"),
    "vm_refcnt": _member("vm_area_struct", "vm_refcnt"),
    "vma_typesafe": _member("vm_area_struct", "vm_freeptr"),
    "vma_layout_packed": _packed_layout,
    "hugetlb_unshare_in_split": _unshare_in_split,
    "copy_vma_undo": _copy_vma_undo,
    "anon_merge_fix": _anon_merge_fix,
    "mmap_prepare": _mmap_prepare,
    "compat_mmap_prepare": _any_function("compat_vma_mmap_prepare", "compat_vma_mmap"),
    "vma_alloc_in_mm": _same_release(_exec_in_mm),
    "init_stack_in_mm": _exec_in_mm,
    "vma_exec": _same_release(_exec_in_mm),
    "skip_vma_uprobe": _member("vma_merge_struct", "skip_vma_uprobe"),
    "early_ksm_flag": _member("mmap_state", "check_ksm_early"),
    "multi_vma_mremap": _member("vma_remap_struct", "vmi_needs_invalidate"),
    "desc_vm_file": _member("vm_area_desc", "vm_file"),
    "copied_from": _member("vma_merge_struct", "copied_from"),
    "sticky_flags": _sticky,
    "desc_action": _member("vm_area_desc", "action"),
    "desc_vma_flags": _wide_descriptor,
    "compat_assigns_flags": _same_release(_wide_descriptor),
    "mremap_count_7_1": _same_release(_member("vm_operations_struct", "mapped")),
    "wide_flags": _wide_flags,
    "merged_keeps_ops": _same_release(_member("mmap_action", "error_override")),
    "anon_pgoff": _member("vm_area_struct", "__vm_anon_pgoff_lo"),
    "no_dontunmap_self_merge": _keep_source,
    "secretmem_unlocked": _struct("secretmem_inode_state"),
}


def detect(btf: Btf | None) -> Mapping[str, Finding]:
    """Every feature with its value and detector; all unknown where there is no BTF."""
    if btf is None:
        return MappingProxyType({key: Finding(None, "no BTF") for key in FEATURES})
    return MappingProxyType({key: _DETECTORS[key](btf) if key in _DETECTORS else UNKNOWN for key in FEATURES})


# Build-time options of the kernel that decide layouts and that BTF shows.
_CONFIG: Mapping[str, Detector] = {
    "numa": _member("vm_area_struct", "vm_policy"),
    "userfaultfd": _member("vm_area_struct", "vm_userfaultfd_ctx.ctx"),
    "anon_vma_name": _any_function("anon_vma_name_alloc", "set_anon_vma_name", "replace_anon_vma_name"),
    "ksm": _member("mm_struct", "ksm_merging_pages"),
    "per_vma_lock": _member("vm_area_struct", "vm_lock_seq"),
    "hugetlb": _any_function("hugetlb_vm_op_split", "hugetlb_vm_op_open"),
    "secretmem": _any_function("secretmem_mmap_prepare", "secretmem_mmap", "secretmem_init"),
    "maple_tree": _member("mm_struct", "mm_mt"),
}


def detect_config(btf: Btf | None) -> Mapping[str, Finding]:
    """Build-time options of the kernel, with their detectors; `soft_dirty` and `thp` need behaviour."""
    if btf is None:
        return MappingProxyType({key: Finding(None, "no BTF") for key in _CONFIG})
    return MappingProxyType({key: detector(btf) for key, detector in _CONFIG.items()})
