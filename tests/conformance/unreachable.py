"""What random calls of one process on this machine cannot reach, each with the reason."""

from __future__ import annotations

from typing import Final

_NO_MEMORY: Final = "the kernel has to run out of memory inside a call"
_READ_LOCK: Final = "done under the read lock: replay sees what came of it at the next look, as an input"
_NO_NAMES: Final = "this kernel is built without CONFIG_ANON_VMA_NAME"
_NO_SOFT_DIRTY: Final = "this kernel is built without CONFIG_MEM_SOFT_DIRTY"
_NO_KEYS: Final = "this CPU has no protection keys"
_EXEC: Final = "the layout after exec is an input of replay"
_NO_GROWTH: Final = "a stack that may not grow changes nothing: the fault is no operation"

#: Rules that stand on this kernel and that no run can make decide.
RULES: Final[dict[str, str]] = {
    "anon_name_equal": _NO_NAMES,
    "name_anonymous_only": _NO_NAMES,
    "name_writes_old_flags": _NO_NAMES,
    "softdirty_ignored": _NO_SOFT_DIRTY,
    "softdirty_on_new": _NO_SOFT_DIRTY,
    "execute_only_pkey": _NO_KEYS,
    "pkey_kept": _NO_KEYS,
    "prealloc_fails": _NO_MEMORY,
    "modify_nomem": _NO_MEMORY,
    "uffd_release_quiet": _NO_MEMORY,
    "overcommit": "the heuristic mode refuses by the free memory, which no record holds; mode 2 is the machine's",
    "brk_looks_left": "brk keeps a page free above itself, so nothing on its right could join",
    "one_hook": "no file has both hooks: the kernel warns of a driver that does",
    "compat_layer": "only probes inside the kernel see the nested hook: the decisions layer",
    "compat_only_adds_flags": "no hook of a file system takes a flag away",
    "compat_overwrites_ops": "no file system below an overlay has a close hook",
    "fault_gives_anon_vma": _READ_LOCK,
    "guard_flag_set": _READ_LOCK,
    "guard_prepares_anon_vma": _READ_LOCK,
    "guard_anon_only": _READ_LOCK,
    "guard_valid": _READ_LOCK,
    "populate_write_needs_write": _READ_LOCK,
    "exec_stack_setup": _EXEC,
    "exec_stack_moves": _EXEC,
    "stack_guard_gap": _NO_GROWTH,
    "rlimit_stack": _NO_GROWTH,
}

#: Outcomes that come about now and then and that nothing here can make frequent, by call and word.
OUTCOMES: Final[dict[tuple[str, str], str]] = {
    ("ioctl", "EBUSY"): "which userfaultfd a refused call was for is in no record: most are undecided",
    ("mremap", "merge unknown"): "the side is not told where both the copy and what it left merged",
    ("other", "merge unknown"): "the last close of a userfaultfd merges many, on many sides",
    ("other", "in place"): "the last close of a userfaultfd that has but one VMA",
}
