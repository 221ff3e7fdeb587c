"""The probe plan: what each layer of capture would attach to on this kernel, and what is lost without it.

Chosen from BTF and the kernel's symbol names alone; whether the kernel lets us attach is found by trying
(`vmatrace.capture.probe_trials`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vmatrace.btf import Btf

Layer = Literal["operations", "decisions"]
Kind = Literal["raw tracepoint", "iterator", "function"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to attach to. ``name`` is empty where this kernel has none of the ``wanted`` names.

    ``symbol`` is the function's name in the symbol table, which a compiler may have given a suffix;
    ``traceable`` says that BTF describes it under its exact name, as a trampoline needs.
    """

    layer: Layer
    kind: Kind
    name: str
    wanted: tuple[str, ...]
    shows: str
    lost: str
    required: bool = False
    symbol: str = ""
    traceable: bool = False


# Raw tracepoints of the operations layer: (name, what it shows, what is lost, required).
_TRACEPOINTS: tuple[tuple[str, str, str, bool], ...] = (
    (
        "mmap_lock_acquire_returned",
        "the VMAs before an operation, and after a downgrade",
        "states cannot be read: no trace",
        True,
    ),
    ("mmap_lock_released", "the VMAs after an operation", "states cannot be read: no trace", True),
    ("sys_exit", "the calls and their results", "no operation has a name or a result: no trace", True),
    (
        "vm_unmapped_area",
        "the address the kernel chose",
        "the neighbours of a chosen address before a map",
        True,
    ),
    ("ma_write", "each VMA stored in the tree", "the second, independent evidence", True),
    ("kmem_cache_alloc", "births of VMA objects", "the second, independent evidence", True),
    ("kmem_cache_free", "deaths of VMA objects", "which VMA a merge or an unmap removed", True),
    ("sched_process_fork", "a child's address space", "children are not followed", True),
    ("sched_process_exec", "a new program image", "images after exec are not followed", True),
    ("sched_process_exit", "the end of a process", "when a process ended", True),
    ("exit_mmap", "the death of an address space", "address spaces are confused when reused", True),
)

# Functions of the decisions layer, in the order of their usefulness: alternatives by kernel, what they show.
_FUNCTIONS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("vma_merge_new_range", "vma_merge"),
        "merge attempts of new ranges, refused ones too",
        "refused merges of new ranges are predicted, not seen",
    ),
    (
        ("vma_modify", "vma_merge"),
        "merge attempts of changed ranges, and their errors",
        "refused merges of changed ranges are predicted, not seen",
    ),
    (("vma_merge_extend",), "growth in place", "growth in place is seen by its effect only"),
    (("can_vma_merge_right",), "why the right side was refused", "the refusing condition is predicted"),
    (("can_vma_merge_left",), "why the left side was refused", "the refusing condition is predicted"),
    (("is_mergeable_anon_vma",), "the anon_vma test", "the anon_vma test is predicted"),
    (("commit_merge", "__vma_adjust"), "the ranges that a merge settles on", "seen by its effect only"),
    (("__split_vma",), "splits, failed ones too", "a split that fails half-way is predicted"),
    (("copy_vma",), "the copy step of mremap", "seen by its effect only"),
    (("vma_expand",), "growth of a VMA over its neighbour", "seen by its effect only"),
    (("vma_shrink",), "exec's stack relocation", "seen by its effect only"),
    (
        ("__mmap_region", "mmap_region"),
        "the flags that a mapping was made with",
        "a driver's changes to flags are learnt from other operations or UNDECIDED",
    ),
    (
        ("compat_vma_mmap", "compat_vma_mmap_prepare"),
        "mmap_prepare called for a stacked file",
        "stacked files' hooks are inferred",
    ),
    (("__anon_vma_prepare",), "who gains which anon_vma", "read from the next state"),
    (("expand_downwards",), "stack growth", "seen by its effect only"),
    (("dup_mmap",), "fork's copy", "seen by its effect only"),
)

# Functions that end like a hook of mmap_prepare and are none, and hooks that end otherwise.
_NOT_HOOKS = ("mmap_action_prepare", "compat_vma_mmap_prepare", "__compat_vma_mmap_prepare")
_ODD_HOOKS = ("mmap_zero_prepare", "mmap_mem_prepare")


def operations_plan(btf: Btf | None) -> tuple[Probe, ...]:
    """The probes of the operations layer; a name that the kernel's BTF does not list is left empty."""
    known = None if btf is None else frozenset(btf.tracepoints())
    probes = [
        Probe(
            "operations",
            "raw tracepoint",
            name if known is None or name in known else "",
            (name,),
            shows,
            lost,
            required,
        )
        for name, shows, lost, required in _TRACEPOINTS
    ]
    iterator = btf is None or btf.function("bpf_iter_task_vma") is not None
    probes.append(
        Probe(
            "operations",
            "iterator",
            "task_vma" if iterator else "",
            ("task_vma",),
            "the first snapshot of a running process",
            "processes that run already start unknown (-p, --all)",
        )
    )
    return tuple(probes)


def decisions_plan(btf: Btf | None, symbols: Iterable[str]) -> tuple[Probe, ...]:
    """The probes of the decisions layer, given the names of the kernel's symbols (`kallsyms`)."""
    by_base: dict[str, str] = {}
    for symbol in symbols:
        base = symbol.partition(".")[0]
        if base not in by_base or symbol == base:
            by_base[base] = symbol
    described = frozenset() if btf is None else btf.functions()
    probes = []
    for wanted, shows, lost in _FUNCTIONS:
        name = next((name for name in wanted if name in by_base), "")
        probes.append(_function(name, wanted, shows, lost, by_base, described))
    hooks = mmap_prepare_hooks(by_base)
    for name in hooks or ("",):
        probes.append(
            _function(
                name,
                (name or "*_mmap_prepare",),
                "the descriptor before and after a file's mmap_prepare",
                "mmap_prepare is inferred from f_op->mmap_prepare",
                by_base,
                described,
            )
        )
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


def _function(
    name: str,
    wanted: tuple[str, ...],
    shows: str,
    lost: str,
    symbols: dict[str, str],
    described: frozenset[str],
) -> Probe:
    symbol = symbols.get(name, "")
    traceable = bool(name) and symbol == name and name in described
    return Probe("decisions", "function", name, wanted, shows, lost, symbol=symbol, traceable=traceable)
