"""The values that rules work on: operations, limits, the mm's own fields, effects and results.

No rule is here. Addresses and lengths are bytes unless a comment says pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from vmatrace.vma import AddressSpace, Vma

NO_LIMIT: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class FileGiven:
    """What an mmap (or shmat) was given to map, and what its driver's hook sets: all of it input, never
    predicted.

    ``kept`` is the file that the VMA ends with where the hook replaces it (stacked file systems);
    ``prepare`` says that the file has mmap_prepare and not mmap; ``set_flags`` and ``clear_flags`` are what
    the hook changes.
    """

    identity: Hashable
    kept: Hashable = None
    kind: str = ""
    #: vm_ops is NULL afterwards (private /dev/zero).
    anonymous: bool = False
    close: bool = False
    readable: bool = True
    writable: bool = True
    #: The mount is noexec.
    noexec: bool = False
    #: F_SEAL_WRITE or F_SEAL_FUTURE_WRITE.
    write_sealed: bool = False
    #: A regular file, a block device or a socket: no byte of it lies past MAX_LFS_FILESIZE.
    regular: bool = False
    #: The file can be mapped at all.
    can_map: bool = True
    #: Its mount or type takes MAP_SYNC.
    sync: bool = False
    prepare: bool = False
    #: A stacked ->mmap that calls a file with mmap_prepare (compat layer).
    nested_prepare: bool = False
    #: The nested hook's vm_ops have a close.
    nested_close: bool = False
    #: A faulty driver that has both mmap and mmap_prepare.
    both_hooks: bool = False
    set_flags: int = 0
    clear_flags: int = 0
    #: errno name with which the hook fails.
    hook_error: str | None = None
    #: VM_HUGETLB files: bytes of one page.
    huge_size: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: a system call by its name and arguments, or a bare step of a scenario.

    ``args`` are the call's arguments by the names of the system call's prototype (``addr``, ``len``, ...).
    ``inputs`` holds what the rules cannot know, by these keys:

    ``picked``   address that the kernel chose (mmap, shmat, mremap that moves, io_setup, map_shadow_stack)
    ``file``     a FileGiven for mmap and shmat
    ``policy``   identity of the new policy's content (mbind; None for MPOL_DEFAULT)
    ``name``     new anonymous name (prctl; None to clear)
    ``uffd``     identity of the userfaultfd context (register, unregister, release)
    ``size``     bytes of the segment or ring (shmat, shmdt, io_setup, io_destroy)
    ``av``       identity of the anon_vma that a step creates
    ``event_remap``, ``event_fork``: the userfaultfd asked for that event
    ``execute_pkey``: the mm's execute-only key; ``overcommit_ok``: False where the charge was refused
    """

    name: str
    args: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Config:
    """Kernel configuration that rules ask for."""

    soft_dirty: bool = True
    anon_vma_name: bool = True
    numa: bool = True
    thp: bool = True
    ksm: bool = True
    uffd: bool = True
    #: Protection keys are usable on this CPU.
    pkeys: bool = False
    #: The CPU is an arm64 one with BTI; None: an arm64 one of which that is not known.
    bti: bool | None = False
    #: The tree preallocation fails (the userland tests' fail_prealloc).
    fail_prealloc: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Sysctls, resource limits and the page size at the time of one operation."""

    page_size: int = 4096
    max_map_count: int = 65530
    overcommit_memory: int = 0
    #: Bytes; NO_LIMIT for RLIM_INFINITY.
    rlimit_as: int = NO_LIMIT
    rlimit_data: int = NO_LIMIT
    #: The hard one, which binds where the soft one is 0.
    rlimit_data_max: int = NO_LIMIT
    rlimit_stack: int = 8 << 20
    rlimit_memlock: int = NO_LIMIT
    #: CAP_IPC_LOCK: memlock limits do not bind.
    can_lock: bool = True
    #: READ_IMPLIES_EXEC of the personality.
    read_implies_exec: bool = False
    #: Pages.
    stack_guard_gap: int = 256
    mmap_min_addr: int = 65536
    task_size: int = (1 << 47) - 4096
    config: Config = Config()

    @property
    def shift(self) -> int:
        """log2 of the page size."""
        return self.page_size.bit_length() - 1


@dataclass(slots=True)
class MmState:
    """The mm_struct's own fields; ``apply`` changes them in place. Counters are pages, addresses bytes."""

    map_count: int = 0
    total_vm: int = 0
    data_vm: int = 0
    stack_vm: int = 0
    exec_vm: int = 0
    locked_vm: int = 0
    def_flags: int = 0
    start_brk: int = 0
    brk: int = 0
    start_data: int = 0
    end_data: int = 0
    #: PR_SET_MEMORY_MERGE is on (MMF_VM_MERGE_ANY).
    ksm: bool = False
    #: PR_SET_MDWE refuse-exec-gain.
    mdwe: bool = False
    #: Protection keys allocated (bit n: key n).
    pkeys: int = 1
    #: What VM_DATA_DEFAULT_FLAGS has on this machine beside the usual bits; None until a heap grew.
    data_flags: int | None = None
    #: A VMA with BTI was seen, so the CPU has it.
    bti: bool = False

    def copy(self) -> MmState:
        """An independent copy."""
        return replace(self)

    def snapshot(self) -> tuple[int | bool, ...]:
        """All fields as a tuple, for ``restore``."""
        return (
            self.map_count, self.total_vm, self.data_vm, self.stack_vm, self.exec_vm, self.locked_vm,
            self.def_flags,
            self.start_brk, self.brk, self.start_data, self.end_data, self.ksm, self.mdwe, self.pkeys,
        )  # fmt: skip

    def restore(self, fields: tuple[int | bool, ...]) -> None:
        """Set all fields to a snapshot."""
        (
            self.map_count, self.total_vm, self.data_vm, self.stack_vm, self.exec_vm, self.locked_vm,
            self.def_flags,
            self.start_brk, self.brk, self.start_data, self.end_data, self.ksm, self.mdwe, self.pkeys,
        ) = fields  # type: ignore[assignment]  # fmt: skip


class Merge(NamedTuple):
    """One success of the kernel's merge step; ``side`` is left, right or both as seen from the range."""

    side: str
    survivor: Hashable
    victims: tuple[Hashable, ...]


class Split(NamedTuple):
    """One cut of ``obj`` at ``address``; the ``new`` object is the piece below or above it."""

    address: int
    obj: Hashable
    new: Hashable
    side: str


class Unmap(NamedTuple):
    """One VMA object removed other than by a merge."""

    obj: Hashable
    start: int
    end: int


class New(NamedTuple):
    """A VMA born other than by split or copy."""

    obj: Hashable
    start: int
    end: int


class Copy(NamedTuple):
    """A VMA born as the copy of another (mremap, fork)."""

    obj: Hashable
    source: Hashable
    start: int
    end: int


class Grow(NamedTuple):
    """A VMA that took address space no VMA had: brk, mremap in place, stack growth, exec relocation."""

    obj: Hashable
    start: int
    end: int


class Shrink(NamedTuple):
    """A VMA that gave up one end without being cut (exec relocation)."""

    obj: Hashable
    start: int
    end: int


class Change(NamedTuple):
    """A VMA whose fields changed in place: ``what`` names them (flags, policy, name, uffd, anon_vma, ...)."""

    obj: Hashable
    what: str


Effect = Merge | Split | Unmap | New | Copy | Grow | Shrink | Change


class Unmodelled(Exception):
    """The rules cannot know what the kernel does here; the text says why. The space is left as it was."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ImpossibleInput(Unmodelled):
    """An input that no kernel could have produced (a picked address that is not free): the model or it is
    wrong."""


class Policy(NamedTuple):
    """A memory policy's content, which is its identity."""

    mode: int
    flags: int = 0
    home_node: int = -1
    nodes: int = 0
    user_nodes: int = 0


class KernelError(Exception):
    """Inside the rules: the operation fails with this errno (symbolic name). Never leaves ``apply``."""

    def __init__(self, errno: str) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclass(slots=True)
class Result:
    """What ``apply`` predicts. The space and the MmState given to it were changed in place to the after-
    state."""

    #: Symbolic errno (``ENOMEM``) or None.
    errno: str | None
    #: Return value of the call where it succeeds (an address for mmap, 0 for most).
    ret: int
    effects: tuple[Effect, ...]
    #: Ids of the rules that decided, in order, without repetition.
    rules: tuple[str, ...]
    #: Unknown features that a rule asked for (taken as absent): run again with each to see whether they
    #: matter.
    features_asked: tuple[str, ...]
    space: AddressSpace
    mm: MmState
    #: fork only: the child's space and mm.
    child: AddressSpace | None = None
    child_mm: MmState | None = None
    #: errnos that the call may also end with, layout and counters being the same: pages that no rule knows.
    maybe_errnos: frozenset[str] = frozenset()

    def count(self, kind: type[Effect]) -> int:
        """How many effects of one kind."""
        return sum(1 for effect in self.effects if type(effect) is kind)


__all__ = [
    "Change", "Config", "Copy", "Effect", "FileGiven", "Grow", "ImpossibleInput", "KernelError", "Limits",
    "Merge", "MmState", "NO_LIMIT",
    "New", "Operation", "Policy", "Result", "Shrink", "Split", "Unmap", "Unmodelled", "Vma",
]  # fmt: skip
