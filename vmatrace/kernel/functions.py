"""The functions that the decisions layer probes: which of them this kernel has, and what each shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vmatrace.btf import Btf
from vmatrace.kernel.plan import Probe


@dataclass(frozen=True, slots=True)
class _Function:
    """A decision (schema.DECISIONS) and the functions that make it, by kernel, the best first.

    ``needs``: a struct without which no kernel decides such a thing, so that nothing is lost there.
    """

    what: str
    wanted: tuple[str, ...]
    shows: str
    lost: str
    needs: str = ""


_MERGES, _UNMAPS, _HOOKS = "vma_merge_struct", "vma_munmap_struct", "vm_area_desc"
_BY_EFFECT = "seen by its effect only"

_FUNCTIONS: tuple[_Function, ...] = (
    _Function(
        "MERGE_NEW",
        ("vma_merge_new_range", "vma_merge"),
        "merge attempts of new ranges, refused ones too",
        "refused merges of new ranges are predicted, not seen",
    ),
    _Function(
        "MERGE_EXISTING",
        ("vma_modify", "vma_merge_existing_range", "vma_merge"),
        "merge attempts of changed ranges, and their errors",
        "refused merges of changed ranges are predicted, not seen",
    ),
    _Function("MERGE_EXTEND", ("vma_merge_extend",), "growth in place", _BY_EFFECT, _MERGES),
    _Function("MERGE_COPIED", ("copy_vma",), "the copy step of mremap", _BY_EFFECT),
    _Function(
        "EXPAND",
        ("vma_expand",),
        "growth of a VMA over its neighbour",
        "before 6.12 a new range that mmap or brk merges is seen by its effect only",
    ),
    _Function("SHRINK", ("vma_shrink",), "exec's stack relocation, its end", _BY_EFFECT, "vma_prepare"),
    _Function("SPLIT", ("__split_vma",), "splits, failed ones too", "a split that fails half-way is predicted"),
    _Function(
        "COMPAT_MMAP",
        ("compat_vma_mmap", "compat_vma_mmap_prepare"),
        "mmap_prepare called for a stacked file",
        "stacked files' hooks are inferred",
        _HOOKS,
    ),
    _Function(
        "MMAP",
        ("__mmap_region", "mmap_region"),
        "the flags that a mapping was made with",
        "a driver's changes to flags are learnt from other operations or UNDECIDED",
    ),
    _Function("UNMAP_GATHER", ("vms_gather_munmap_vmas",), "what an unmap cuts free", _BY_EFFECT, _UNMAPS),
    _Function(
        "UNMAP_COMPLETE",
        ("vms_complete_munmap_vmas", "do_vmi_align_munmap", "do_mas_align_munmap"),
        "what an unmap removes",
        _BY_EFFECT,
    ),
    _Function("BRK", ("do_brk_flags",), "growth of the heap", _BY_EFFECT),
    _Function("STACK_GROWTH", ("expand_downwards",), "stack growth", _BY_EFFECT),
    _Function(
        "EXEC_STACK",
        ("create_init_stack_vma",),
        "the first VMA of a new image",
        "read from the image when exec is over",
    ),
    _Function(
        "RELOCATE",
        ("relocate_vma_down", "shift_arg_pages"),
        "the move of a new image's stack",
        "read from the image when exec is over",
    ),
    _Function("FORK_COPY", ("dup_mmap",), "fork's copy", _BY_EFFECT),
    _Function("ANON_PREPARE", ("__anon_vma_prepare",), "who gains which anon_vma", "read from the next state"),
    _Function("ANON_CLONE", ("anon_vma_clone",), "which VMA takes over whose anon_vmas", "read from the next state"),
    _Function("ANON_FORK", ("anon_vma_fork",), "a child's anon_vmas", "read from the child's first states"),
    _Function(
        "HUGETLB_UNSHARE",
        ("hugetlb_split", "hugetlb_unshare_pmds"),
        "page tables unshared before a hugetlb mapping is cut",
        "not seen: it changes no VMA",
    ),
    _Function("VMA_ALLOC", ("vm_area_alloc",), "a new VMA object", "seen by its allocation"),
    _Function("VMA_DUP", ("vm_area_dup",), "a copied VMA object", "seen by its allocation"),
    _Function("VMA_DETACH", ("vma_mark_detached",), "a VMA leaving the tree", "seen when it is freed"),
    _Function("VMA_FREE", ("vm_area_free",), "the end of a VMA object", "seen by its release"),
)
_HOOK = _Function(
    "MMAP_PREPARE",
    ("*_mmap_prepare",),
    "the descriptor before and after a file's mmap_prepare",
    "mmap_prepare is inferred from f_op->mmap_prepare",
    _HOOKS,
)

# Functions that end like a hook of mmap_prepare and are none, and hooks that end otherwise.
_NOT_HOOKS = ("mmap_action_prepare", "compat_vma_mmap_prepare", "__compat_vma_mmap_prepare")
_ODD_HOOKS = ("mmap_zero_prepare", "mmap_mem_prepare")

# What a compiler leaves of a function under another name and whole; `.part` and `.cold` are pieces of one.
_WHOLE = re.compile(r"[^.]+(\.(isra|constprop)\.\d+)*")


def decisions_plan(btf: Btf | None, symbols: Iterable[str]) -> tuple[Probe, ...]:
    """The probes of the decisions layer, given the names of the kernel's symbols (`kallsyms`).

    A function that shows two kinds of decisions is there once, under the first; a decision that this kernel does not
    make (it lacks the struct) is left out.
    """
    by_base: dict[str, str] = {}
    for symbol in symbols:
        base = symbol.partition(".")[0]
        if (base not in by_base or symbol == base) and _WHOLE.fullmatch(symbol):
            by_base[base] = symbol
    described = frozenset() if btf is None else btf.functions()
    probes: list[Probe] = []
    for function in _FUNCTIONS:
        # Without a description nobody knows which argument is what; a hook has one only.
        name = next((name for name in function.wanted if name in by_base and (btf is None or name in described)), "")
        if name and any(name == probe.name for probe in probes):
            continue
        if name or not function.needs or btf is None or btf.find_struct(function.needs):
            probes.append(_probe(function, name, function.wanted, by_base, described))
    hooks = mmap_prepare_hooks((*by_base, *described))
    if not hooks and btf is not None and btf.find_struct(_HOOKS) is None:
        return tuple(probes)
    for hook in hooks or _HOOK.wanted:
        probes.append(_probe(_HOOK, hook if hook in by_base else "", (hook,), by_base, described))
    return tuple(probes)


def mmap_prepare_hooks(symbols: Iterable[str]) -> tuple[str, ...]:
    """The symbols that are mmap_prepare hooks of files, by their names."""
    return tuple(
        sorted(
            name
            for name in set(symbols)
            if name in _ODD_HOOKS
            # A __pfx_ symbol is the padding before a function, not one.
            or (name.endswith("_mmap_prepare") and not name.startswith("__pfx_") and name not in _NOT_HOOKS)
        )
    )


def _probe(
    function: _Function,
    name: str,
    wanted: tuple[str, ...],
    symbols: dict[str, str],
    described: frozenset[str],
) -> Probe:
    symbol = symbols.get(name, "")
    return Probe(
        "decisions",
        "function",
        name,
        wanted,
        function.shows,
        function.lost,
        symbol=symbol,
        traceable=bool(name) and symbol == name and name in described,
        what=function.what,
    )
