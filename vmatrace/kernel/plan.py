"""The probe plan: what capture would attach to on this kernel, and what is lost without it.

The functions of the decisions layer are in `vmatrace.kernel.functions`. Chosen from BTF and the kernel's symbol
names alone; whether the kernel lets us attach is found by trying (`vmatrace.capture.probe_trials`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmatrace.btf import Btf

Layer = Literal["operations", "decisions"]
Kind = Literal["raw tracepoint", "iterator", "function"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to attach to. ``name`` is empty where this kernel has none of the ``wanted`` names.

    ``symbol`` is the function's name in the symbol table, which a compiler may have given a suffix;
    ``traceable`` says that BTF describes it under its exact name, as a trampoline needs; ``what`` of schema.DECISIONS
    it shows.
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
    what: str = ""


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
