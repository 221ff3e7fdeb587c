"""Limits that decide at each operation: sysctls, resource limits, personality, and what changes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from vmatrace.kernel import KernelProfile
from vmatrace.rules.model import Config, Limits
from vmatrace.syscalls import SystemCall

_RESOURCES: Final = {2: "RLIMIT_DATA", 3: "RLIMIT_STACK", 8: "RLIMIT_MEMLOCK", 9: "RLIMIT_AS"}
_FIELD: Final = {
    "RLIMIT_AS": "rlimit_as",
    "RLIMIT_DATA": "rlimit_data",
    "RLIMIT_STACK": "rlimit_stack",
    "RLIMIT_MEMLOCK": "rlimit_memlock",
    "vm.max_map_count": "max_map_count",
    "vm.overcommit_memory": "overcommit_memory",
    "vm.stack_guard_gap": "stack_guard_gap",
    "vm.mmap_min_addr": "mmap_min_addr",
}
# After these a call's last argument says whether the task holds CAP_IPC_LOCK (USER_ARGUMENTS in schema.py).
_TELL_CAPABILITY: Final = ("OP_EXEC", "OP_CREDENTIALS")
_READ_IMPLIES_EXEC: Final = 0x0400000
_QUERY: Final = 0xFFFFFFFF
# TASK_SIZE: the top of user space less a guard page; 32-bit tasks end below 4 GiB.
_TASK_SIZE: Final = {"x86_64": (1 << 47) - 4096, "aarch64": 1 << 48}
_COMPAT_TASK_SIZE: Final = {"x86_64": 0xFFFFE000, "aarch64": 1 << 32}


class LimitBook:
    """The limits of each process (thread group), the machine's own, and how they change."""

    def __init__(self, profile: KernelProfile, credentials: bool) -> None:
        self._credentials = credentials
        found = {name: profile.config[name].value for name in profile.config}
        default = Config()
        config = Config(
            soft_dirty=_known(found.get("soft_dirty"), default.soft_dirty),
            anon_vma_name=_known(found.get("anon_vma_name"), default.anon_vma_name),
            numa=_known(found.get("numa"), default.numa),
            thp=_known(found.get("thp"), default.thp),
            ksm=_known(found.get("ksm"), default.ksm),
            uffd=_known(found.get("userfaultfd"), default.uffd),
            # Where the CPU has no keys, no mapping ever shows one.
            pkeys=_known(found.get("pkeys"), True),
            bti=None if profile.arch == "aarch64" else False,
        )
        self._arch = profile.arch
        limits = profile.limits
        self._base = Limits(
            page_size=profile.page_size,
            max_map_count=_number(limits.get("max_map_count"), 65530),
            overcommit_memory=_number(limits.get("overcommit_memory"), 0),
            mmap_min_addr=_number(limits.get("mmap_min_addr"), 65536),
            stack_guard_gap=_number(limits.get("stack_guard_gap"), 256),
            read_implies_exec=bool(_number(limits.get("personality"), 0) & _READ_IMPLIES_EXEC),
            task_size=_TASK_SIZE.get(profile.arch, (1 << 47) - profile.page_size),
            config=config,
        )
        self._changes: dict[int, dict[str, Any]] = {}
        self._default: dict[str, Any] = {}
        self._cache: dict[tuple[int, int], Limits] = {}

    def of(self, pid: int, abi: int) -> Limits:
        """The limits of a process now; ``abi`` 1: a 32-bit call."""
        found = self._cache.get((pid, abi))
        if found is None:
            values = {**self._default, **self._changes.get(pid, {})}
            if abi:
                values["task_size"] = _COMPAT_TASK_SIZE.get(self._arch, 1 << 32)
            found = self._cache[pid, abi] = replace(self._base, **values)
        return found

    def row(self, row: dict[str, Any], known_pids: frozenset[int]) -> None:
        """Take in a row of the table ``limits``; those of a pid that is not traced hold for every process."""
        name, value, pid = str(row["name"]), int(row["value"]), int(row["pid"])
        field: dict[str, Any]
        if name == "CAP_IPC_LOCK":
            field = {"can_lock": bool(value)}
        elif name == "personality":
            field = {"read_implies_exec": bool(value & _READ_IMPLIES_EXEC)}
        elif name in _FIELD:
            field = {_FIELD[name]: value}
        else:
            return
        if pid == 0 or pid not in known_pids:
            self._default.update(field)
        else:
            self._changes.setdefault(pid, {}).update(field)
        self._cache.clear()

    def fork(self, parent: int, child: int) -> None:
        """A child process begins with its parent's limits."""
        if parent in self._changes:
            self._changes[child] = dict(self._changes[parent])
        else:
            self._changes.pop(child, None)
        self._cache.pop((child, 0), None)
        self._cache.pop((child, 1), None)

    def call(self, entry: SystemCall, pid: int, args: tuple[int, ...], result: int) -> None:
        """A call that may set limits returned."""
        if result < 0:
            return
        name = entry.name
        if entry.op_class in _TELL_CAPABILITY:
            if self._credentials:
                self._set(pid, {"can_lock": bool(args[5])})
            return
        if name == "personality":
            if args[0] & _QUERY != _QUERY:
                self._set(pid, {"read_implies_exec": bool(args[0] & _READ_IMPLIES_EXEC)})
            return
        target, resource = (args[0], args[1]) if name == "prlimit64" else (0, args[0])
        field = _RESOURCES.get(resource & 0xFFFFFFFF)
        asks_only = not args[2 if name == "prlimit64" else 1]
        if field is None or asks_only:
            return
        limits = {_FIELD[field]: args[4]}
        if field == "RLIMIT_DATA":
            limits["rlimit_data_max"] = args[5]
        self._set(target & 0xFFFFFFFF or pid, limits)

    def _set(self, pid: int, field: dict[str, Any]) -> None:
        self._changes.setdefault(pid, {}).update(field)
        self._cache.pop((pid, 0), None)
        self._cache.pop((pid, 1), None)


def _known(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _number(value: int | None, default: int) -> int:
    return default if value is None else value
