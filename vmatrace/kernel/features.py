"""The table of kernel differences: every feature that switches a rule, with the commit that made it.

A feature is one fact about a kernel - yes, no or unknown - and never derived from a version number.
``sign`` says how it is found; the detectors themselves are in `vmatrace.kernel.detect`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit of the mainline kernel, cited by its 12-digit hash, its subject and its first release."""

    id: str
    subject: str
    version: str

    def __str__(self) -> str:
        return f'Linux kernel commit {self.id} ("{self.subject}") (in {self.version})'


@dataclass(frozen=True, slots=True)
class Feature:
    """One fact about a kernel that switches rules.

    ``commit`` is None where the commit is not known; ``since`` is the first mainline release that has
    the feature ("by v6.12" where only the later of two releases was read); ``sign`` is how to find it.
    ``observable`` is false where no layout, flag or errno shows it from outside.
    """

    id: str
    summary: str
    commit: Commit | None
    since: str
    sign: str
    observable: bool = True


_BEHAVIOUR = "no sign in BTF: by behaviour"

_TABLE: tuple[Feature, ...] = (
    Feature(
        "munmap_new_outside",
        "munmap's split makes the staying piece the new object (before: the first cut's upper piece)",
        None,
        "by v6.6",
        "function __vma_adjust is gone",
    ),
    Feature(
        "ksm_opt_in",
        "PR_SET_MEMORY_MERGE opts a whole process into KSM: new mappings carry MERGEABLE",
        Commit("d7597f59d1d3", "mm: add new api to enable ksm per process", "v6.4"),
        "v6.4",
        "function ksm_add_vma or ksm_vma_flags",
    ),
    Feature(
        "close_only_deleted",
        "a close hook matters only for VMAs that a merge would delete",
        Commit(
            "714965ca8252",
            "mm/mmap: start distinguishing if vma can be removed in mergeability test",
            "v6.4",
        ),
        "v6.4",
        _BEHAVIOUR + "; struct vma_merge_struct implies it",
    ),
    Feature(
        "mprotect_drops_account",
        "mprotect to non-writable of an unfaulted anonymous VMA drops ACCOUNT",
        Commit(
            "9b9143298585",
            "mm/mprotect: allow unfaulted VMAs to be unaccounted on mprotect()",
            "v6.7",
        ),
        "v6.7",
        _BEHAVIOUR,
    ),
    Feature(
        "map_stack_nohuge",
        "MAP_STACK sets NOHUGEPAGE (where THP is configured)",
        Commit("c4608d1bf7c6", "mm: mmap: map MAP_STACK to VM_NOHUGEPAGE", "v6.7"),
        "v6.7",
        _BEHAVIOUR,
    ),
    Feature(
        "mseal",
        "the mseal system call and the SEALED flag",
        Commit("8be7258aad44", "mseal: add mseal syscall", "v6.10"),
        "v6.10",
        "function do_mseal, mseal_apply or __do_sys_mseal",
    ),
    Feature(
        "mseal_per_vma",
        "the seal test comes per VMA, so a call that meets a sealed VMA keeps its earlier effects",
        Commit("4a2dd02b0916", "mm/mprotect: replace can_modify_mm with can_modify_vma", "v6.12"),
        "v6.12",
        "struct vma_merge_struct exists",
    ),
    Feature(
        "droppable",
        "MAP_DROPPABLE mappings (NORESERVE, WIPEONFORK and DONTDUMP come with it)",
        Commit("9651fcedf7b9", "mm: add MAP_DROPPABLE for designating always lazily freeable mappings", "v6.11"),
        "v6.11",
        _BEHAVIOUR,
    ),
    Feature(
        "vmg",
        "the vma_merge_struct era: merge_new_range, prev before next, an overlay gathers before it unmaps",
        Commit(
            "2f1c6611b0a8",
            "mm: introduce vma_merge_struct and abstract vma_merge(),vma_modify()",
            "v6.12",
        ),
        "v6.12",
        "struct vma_merge_struct exists",
    ),
    Feature(
        "guard_regions",
        "MADV_GUARD_INSTALL and MADV_GUARD_REMOVE",
        Commit("662df3e5c376", "mm: madvise: implement lightweight guard page mechanism", "v6.13"),
        "v6.13",
        _BEHAVIOUR,
    ),
    Feature(
        "vmg_target",
        "vma_merge_struct names its VMAs target and middle",
        Commit("3a75ccba047b", "mm: simplify vma merge structure and expand comments", "v6.15"),
        "v6.15",
        "member vma_merge_struct.target",
        observable=False,
    ),
    Feature(
        "vm_refcnt",
        "a VMA is attached and detached by a reference count",
        Commit("f35ab95ca0af", "mm: replace vm_lock and detached flag with a reference count", "v6.15"),
        "v6.15",
        "member vm_area_struct.vm_refcnt",
        observable=False,
    ),
    Feature(
        "vma_typesafe",
        "VMA objects are reused at once, without waiting for RCU",
        Commit("3104138517fc", "mm: make vma cache SLAB_TYPESAFE_BY_RCU", "v6.15"),
        "v6.15",
        "member vm_area_struct.vm_freeptr",
    ),
    Feature(
        "vma_layout_packed",
        "rarely used members of vm_area_struct stand in its last cache line",
        Commit(
            "6bef4c2f9722",
            "mm: move lesser used vma_area_struct members into the last cacheline",
            "v6.15",
        ),
        "v6.15",
        "offset of vm_area_struct.vm_file below that of vm_area_struct.shared",
        observable=False,
    ),
    Feature(
        "hugetlb_unshare_in_split",
        "hugetlb page tables are unshared inside the split, after its locks, not before it",
        Commit("081056dc00a2", "mm/hugetlb: unshare page tables during VMA split, not before", "v6.16"),
        "v6.16",
        "function hugetlb_split",
        observable=False,
    ),
    Feature(
        "copy_vma_undo",
        "copy_vma that fails at its last step gives hugetlb reservations back",
        Commit("ee40c9920ac2", "mm: fix copy_vma() error handling for hugetlb mappings", "v6.16"),
        "v6.16",
        "function fixup_hugetlb_reservations; absent where it was inlined: unknown",
        observable=False,
    ),
    Feature(
        "anon_merge_fix",
        "an unfaulted VMA takes a faulted one unless the source is a fork child",
        Commit("879bca0a2c4f", "mm/vma: fix incorrectly disallowed anonymous VMA merges", "v6.16"),
        "v6.16",
        "is_mergeable_anon_vma takes 2 parameters, or vma_merge_struct.middle beside struct vm_area_desc",
    ),
    Feature(
        "mmap_prepare",
        "f_op->mmap_prepare runs before the first merge test; no merge is retried after ->mmap",
        Commit("c84bf6dd2b83", "mm: introduce new .mmap_prepare() file callback", "v6.16"),
        "v6.16",
        "struct vm_area_desc and member file_operations.mmap_prepare",
    ),
    Feature(
        "compat_mmap_prepare",
        "a stacked ->mmap reaches another file's mmap_prepare through a compatibility layer",
        Commit("bb666b7c2707", "mm: add mmap_prepare() compatibility layer for nested file systems", "v6.16"),
        "v6.16",
        "function compat_vma_mmap_prepare or compat_vma_mmap",
    ),
    Feature(
        "vma_alloc_in_mm",
        "VMA objects are allocated, freed and duplicated by mm/ code",
        Commit("3e43e260f1e4", "mm: perform VMA allocation, freeing, duplication in mm", "v6.16"),
        "v6.16",
        "no sign of its own: function create_init_stack_vma marks the same release",
        observable=False,
    ),
    Feature(
        "init_stack_in_mm",
        "exec's first stack VMA is made by create_init_stack_vma",
        Commit("dd7a6246f4fd", "mm: abstract initial stack setup to mm subsystem", "v6.16"),
        "v6.16",
        "function create_init_stack_vma",
        observable=False,
    ),
    Feature(
        "vma_exec",
        "exec's stack relocation is mm/vma_exec.c's",
        Commit("6c36ac1e124f", "mm: establish mm/vma_exec.c for shared exec/mm VMA functionality", "v6.16"),
        "v6.16",
        "no sign of its own: function create_init_stack_vma marks the same release",
        observable=False,
    ),
    Feature(
        "uffd_not_droppable",
        "userfaultfd refuses MAP_DROPPABLE memory",
        None,
        "by v6.17",
        _BEHAVIOUR,
    ),
    Feature(
        "skip_vma_uprobe",
        "a merge made by mremap does not arm uprobes again",
        Commit("2b12d06c37fd", "mm: fix uprobe pte be overwritten when expanding vma", "v6.16"),
        "v6.16",
        "member vma_merge_struct.skip_vma_uprobe",
        observable=False,
    ),
    Feature(
        "dontunmap_drops_account",
        "the source of MREMAP_DONTUNMAP loses ACCOUNT",
        Commit("b714ccb02a76", "mm/mremap: complete refactor of move_vma()", "v6.15"),
        "v6.15, taken back in v6.18",
        _BEHAVIOUR,
    ),
    Feature(
        "early_ksm_flag",
        "MERGEABLE is set before the merge test of a new mapping",
        Commit("cf7e7a3503df", "mm: prevent KSM from breaking VMA merging for new VMAs", "v6.17"),
        "v6.17",
        "member mmap_state.check_ksm_early",
    ),
    Feature(
        "multi_vma_mremap",
        "mremap with FIXED and equal lengths moves several VMAs and the gaps between them",
        Commit("d23cb648e365", "mm/mremap: permit mremap() move of multiple VMAs", "v6.17"),
        "v6.17",
        "member vma_remap_struct.vmi_needs_invalidate",
    ),
    Feature(
        "seal_bit_low",
        "VM_SEALED is bit 42 (before: 63)",
        Commit("f225b34f1e6c", "mm/mseal: always define VM_SEALED", "v6.17"),
        "v6.17",
        _BEHAVIOUR + ": that of seal_discard_by_ops, the next commit",
        observable=False,
    ),
    Feature(
        "seal_discard_by_ops",
        "a seal protects what has no vm_ops from discarding advice, private /dev/zero too (before: no file)",
        Commit("d0b47a6866f1", "mm/mseal: update madvise() logic", "v6.17"),
        "v6.17",
        _BEHAVIOUR,
    ),
    Feature(
        "desc_vm_file",
        "vm_area_desc keeps the file called and lets the hook replace vm_file",
        Commit("af6703838ecb", "mm: specify separate file and vm_file params in vm_area_desc", "v6.18"),
        "v6.18",
        "member vm_area_desc.vm_file",
    ),
    Feature(
        "copied_from",
        "a faulted VMA moved over an unfaulted one clones its anon_vma; a fork child is refused",
        Commit("61f67c230a5e", "mm/vma: fix anon_vma UAF on mremap() faulted, unfaulted merge", "v6.19"),
        "v6.19",
        "member vma_merge_struct.copied_from",
    ),
    Feature(
        "sticky_flags",
        "SOFTDIRTY and MAYBE_GUARD are ignored in the compare and OR-ed into the survivor",
        Commit("64212ba02e66", "mm: implement sticky VMA flags", "v6.19"),
        "v6.19",
        "6th parameter of vma_modify_flags is a pointer",
    ),
    Feature(
        "guard_av_anon_only",
        "MADV_GUARD_INSTALL prepares an anon_vma on anonymous VMAs only",
        None,
        "v6.19",
        _BEHAVIOUR,
    ),
    Feature(
        "desc_action",
        "vm_area_desc carries an action (a PFN remap) to do once the VMA stands",
        Commit("ac0a3fc9c07d", "mm: add ability to take further action in vm_area_desc", "v6.19"),
        "v6.19",
        "member vm_area_desc.action",
    ),
    Feature(
        "desc_vma_flags",
        "vm_area_desc has vma_flags_t flags only",
        Commit("53f1d9364451", "mm: make vm_area_desc utilise vma_flags_t only", "v7.0"),
        "v7.0",
        "member vm_area_desc.vma_flags without vm_area_desc.vm_flags",
    ),
    Feature(
        "compat_assigns_flags",
        "the compatibility layer assigns the hook's flags (before: it could only add some)",
        None,
        "v7.0",
        "no sign of its own: vm_area_desc.vma_flags without vm_area_desc.vm_flags marks the same release",
    ),
    Feature(
        "mremap_count_7_1",
        "mremap's max_map_count rule restated: 4 more VMAs must fit, shrinking calls are tested too",
        Commit("9b9b8d4aebf1", "mm/mremap: correct invalid map count check", "v7.1"),
        "v7.1",
        "no sign of its own: vm_operations_struct.mapped marks the same release",
    ),
    Feature(
        "wide_flags",
        "all words of vma_flags_t are compared",
        Commit("769669bd9ca4", "mm/vma: convert as much as we can in mm/vma.c to vma_flags_t", "v7.1"),
        "v7.1",
        "6th parameter of vma_modify_flags is vma_flags_t *",
    ),
    Feature(
        "merged_keeps_ops",
        "a mapping that merges leaves the vm_ops of the VMA it joins (before: mmap_prepare's replaced them)",
        None,
        "v7.2",
        "no sign of its own: member mmap_action.error_override marks the same release",
    ),
    Feature(
        "anon_pgoff",
        "every VMA has a second page offset; private file VMAs need both contiguous",
        None,
        "v7.3",
        "member vm_area_struct.__vm_anon_pgoff_lo",
    ),
    Feature(
        "no_dontunmap_self_merge",
        "MREMAP_DONTUNMAP may not merge with its own source",
        Commit("838bb60dc215", "mm/mremap: fix locked_vm leak from MREMAP_DONTUNMAP self-merge", "v7.3"),
        "v7.3",
        "a parameter of copy_vma is named keep_source",
    ),
    Feature(
        "dontunmap_splits_locked",
        "MREMAP_DONTUNMAP of a part of a locked VMA splits it, so the rest stays locked",
        Commit("597e4b9ab48a", "mm/mremap: fix locked_vm leak by splitting VMA for MREMAP_DONTUNMAP", "v7.3"),
        "v7.3",
        _BEHAVIOUR,
    ),
    Feature(
        "dontunmap_resets_pgoff",
        "the unfaulted source that MREMAP_DONTUNMAP leaves gets the page offset of its own address",
        Commit("35b0fb391b0d", "mm/mremap: reset unfaulted VMA page offset for MREMAP_DONTUNMAP", "v7.3"),
        "v7.3",
        _BEHAVIOUR,
    ),
    Feature(
        "uffd_modes_kept",
        "registering a range again may not drop write-protect tracking",
        None,
        "by v7.3",
        _BEHAVIOUR,
    ),
    Feature(
        "secretmem_unlocked",
        "secretmem no longer sets LOCKED",
        Commit("97d34aa65c29", "mm/secretmem: properly account locked pages", "v7.3"),
        "v7.3",
        "struct secretmem_inode_state exists",
    ),
    Feature(
        "droppable_unlockable",
        "a MAP_DROPPABLE mapping asked to be locked loses the lock bits",
        Commit("d239462787b0", "mm: prevent droppable mappings from being locked", "v7.1"),
        "v7.1",
        _BEHAVIOUR,
    ),
)

FEATURES: Mapping[str, Feature] = MappingProxyType({feature.id: feature for feature in _TABLE})
