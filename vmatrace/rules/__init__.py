"""The kernel's rules about VMAs: one rule is one function with a sentence for a name, and knows its commit.

``vmatrace.rules.registry`` lists them; ``vmatrace.simulator`` runs them. A rule is found by the kernel's
function name: each module's first line names the functions that it states.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from vmatrace.rules.context import Kernel
from vmatrace.rules.model import Operation

#: Modules whose ``CALLS`` table maps names of system calls and events to their handlers.
_CALL_MODULES = (
    "anon_vma", "brk", "lifecycle", "madvise", "mbind", "mlock", "mmap", "mprotect", "mremap", "mseal", "munmap",
    "prctl", "remap_file_pages", "shm", "stack", "userfaultfd",
)  # fmt: skip


def load_all() -> dict[str, Callable[[Kernel, Operation], int]]:
    """Import every module of rules (which registers them) and return the handlers by the call's name."""
    import_module("vmatrace.rules.objects")
    calls: dict[str, Callable[[Kernel, Operation], int]] = {}
    for name in _CALL_MODULES:
        calls.update(import_module(f"vmatrace.rules.{name}").CALLS)
    return calls
