"""From a recorded system call to the operation that the rules run: arguments by name, and the inputs they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, NamedTuple

from vmatrace.replay.files import Files
from vmatrace.rules.constants import (
    MAP_ANONYMOUS, MAP_HUGETLB, MAP_SHARED, MAP_SHARED_VALIDATE, MAP_TYPE, SHM_RDONLY,
)  # fmt: skip
from vmatrace.rules.madvise import NO_VMA_ADVICE
from vmatrace.rules.constants import MADV, MPOL
from vmatrace.rules.model import NO_LIMIT, FileGiven, Operation, Policy
from vmatrace.syscalls import find_call
from vmatrace.vma import Vma

_LOW: Final = 0xFFFFFFFF
_PR_SET_VMA: Final = 0x53564D41
_PR_SET_MM: Final = 35
_GUARD_INSTALL: Final = MADV["MADV_GUARD_INSTALL"]
_UFFDIO_REGISTER: Final = 0x00
_UFFDIO_UNREGISTER: Final = 0x01

#: Calls that change no VMA by definition: the one table of what is SKIPPED, reason by kind.
SKIPPED_KINDS: Final[Mapping[str, str]] = {
    "advice": "madvise: advice about pages, not VMAs",
    "guard": "MADV_GUARD_INSTALL: sets a flag outside the write lock; checked where the VMA is read next",
    "limits": "a call that sets limits",
    "thread": "clone or vfork that shares the address space",
    "no_fork": "fork that failed before it copied",
    "no_exec": "execve that failed",
    "uffd": "ioctl of a userfaultfd about pages, not VMAs",
    "prctl": "prctl that sets a flag of the process",
}


class Skip(NamedTuple):
    """The call is of a kind that changes no VMA: a key of SKIPPED_KINDS."""

    kind: str


class Open(NamedTuple):
    """The call cannot be judged; why."""

    reason: str


class Wrong(NamedTuple):
    """What the record says of the call cannot be; why."""

    reason: str


@dataclass(slots=True)
class Seen:
    """What a call's inputs may be taken from: its result, and what was there when its write section ended."""

    name: str
    abi: int
    args: tuple[int, ...]
    result: int
    #: A failed mmap's file, 0 where it is not known.
    file: int
    page_size: int
    #: VMAs read when the lock was let go.
    after: Sequence[Vma]
    before: Sequence[Vma]
    files: Files
    #: Objects born in the operation, with the range of their first store.
    born: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    #: Whether nothing can be missing: no record was lost, and the place of the result was read.
    whole: bool = True

    def no_file(self, address: int) -> Open | Wrong:
        """What it means that no mapped file was read where the call put it."""
        if self.whole and self.after:
            return Wrong(f"the call returned {address:#x}, where no file is mapped")
        return Open("the mapped file was not read")

    def no_description(self) -> Open | Wrong:
        """What it means that the trace does not describe a file."""
        reason = "the mapped file is not described in the trace"
        return Wrong(reason) if self.whole else Open(reason)

    def at(self, address: int) -> Vma | None:
        """The VMA read at ``address`` afterwards."""
        for vma in self.after:
            if vma.start <= address < vma.end:
                return vma
        return None


Request = Operation | Skip | Open | Wrong

#: Stands for an identity that a failed call does not tell.
UNKNOWN: Final = ("unknown",)
_HUGE: Final = 2 << 20


def request(arch: str, nr: int, seen: Seen) -> Request:
    """The operation that a call asks for."""
    call = find_call(arch, seen.abi, nr)
    if call is None:
        return Open(f"system call {nr} is not modelled")
    make = _MAKERS.get(call.name)
    args = dict(zip(call.arguments, seen.args, strict=False))
    if make is not None:
        return make(args, seen)
    if call.op_class == "OP_LIMITS":
        return Skip("limits")
    return Operation(call.name, args)


def _plain(name: str, *signed: str) -> Callable[[dict[str, int], Seen], Request]:
    def make(args: dict[str, int], seen: Seen) -> Request:
        for key in signed:
            args[key] = _int(args[key])
        return Operation(name, args)

    return make


def _int(value: int) -> int:
    """A C int from a register."""
    value &= _LOW
    return value - (1 << 32) if value >> 31 else value


def _uint(value: int) -> int:
    return value & _LOW


def _mmap(args: dict[str, int], seen: Seen) -> Request:
    if "pgoff" in args:
        args["off"] = args.pop("pgoff") * 4096
    flags = args["flags"] = args["flags"] & (NO_LIMIT if not seen.abi else _LOW)
    picked = seen.result if seen.result >= 0 else None
    inputs: dict[str, Any] = {} if picked is None else {"picked": picked}
    anonymous = bool(flags & MAP_ANONYMOUS) and not flags & MAP_HUGETLB
    if not anonymous:
        given = _file_of_map(args, flags, picked, seen)
        if isinstance(given, Open | Wrong):
            return given
        if given is not None:
            inputs["file"] = given
        if flags & MAP_HUGETLB:
            if given is None or not given.huge_size:
                return Open("the huge page size is not known")
            args["flags"] = flags & ~(MAP_ANONYMOUS | MAP_HUGETLB)
    return Operation("mmap", args, inputs)


def _file_of_map(
    args: dict[str, int], flags: int, picked: int | None, seen: Seen
) -> FileGiven | Open | Wrong | None:
    if picked is None:
        return _file_of_failed_map(flags, seen)
    vma = seen.at(picked)
    if vma is None or not isinstance(vma.file, int):
        return seen.no_file(picked)
    if vma.file not in seen.files.known:
        return seen.no_description()
    shared = flags & MAP_TYPE in (MAP_SHARED, MAP_SHARED_VALIDATE)
    given = seen.files.given(vma.file, shared, not flags & MAP_ANONYMOUS)
    return Open(given) if isinstance(given, str) else given


def _file_of_failed_map(flags: int, seen: Seen) -> FileGiven | None:
    """The file that a failed mmap was given, None where there was none of that number.

    Where it is not known: one that passes every test of a file.
    """
    unknown = FileGiven(UNKNOWN, huge_size=_HUGE if flags & MAP_HUGETLB else 0)
    if flags & MAP_ANONYMOUS:
        return unknown
    if not seen.file:
        return None
    given = seen.files.opened(seen.file)
    return unknown if given is None else given


def _old_mmap(args: dict[str, int], seen: Seen) -> Request:
    """The six words of the structure stand where the arguments of the new mmap do."""
    return _mmap(dict(zip(("addr", "len", "prot", "flags", "fd", "off"), seen.args, strict=True)), seen)


def _mremap(args: dict[str, int], seen: Seen) -> Request:
    inputs = {"picked": seen.result} if seen.result >= 0 else {}
    return Operation("mremap", args, inputs)


def _madvise(args: dict[str, int], seen: Seen) -> Request:
    args["behavior"] = _int(args["behavior"])
    if args["behavior"] in NO_VMA_ADVICE or args["behavior"] == MADV["MADV_POPULATE_WRITE"]:
        return Skip("advice")
    if args["behavior"] == _GUARD_INSTALL:
        return Skip("guard")
    return Operation("madvise", args)


def _process_madvise(args: dict[str, int], seen: Seen) -> Request:
    behavior = _int(args["behavior"])
    if behavior in NO_VMA_ADVICE or behavior == MADV["MADV_POPULATE_WRITE"]:
        return Skip("advice")
    if behavior == _GUARD_INSTALL:
        return Skip("guard")
    if args["vlen"] != 1:
        return Open("process_madvise of more than one range")
    return Operation("madvise", {"start": seen.args[1], "len_in": seen.args[5], "behavior": behavior})


def _mlock2(args: dict[str, int], seen: Seen) -> Request:
    args["flags"] = _uint(args["flags"])
    return Operation("mlock2", args)


@cache
def policy_of(word: int) -> Policy | None:
    """The policy that a row's number stands for (policy_content in bpf/operations.c); None for 0."""
    if not word:
        return None
    mode, flags, home = (word & 0xF) - 1, word >> 4 & 0xFFFF, word >> 20 & 0xFF
    # __mpol_equal looks at the nodes of all modes but LOCAL, and at the user's own where a flag keeps them.
    nodes = word >> 28 & 0xFFFF if mode != MPOL["MPOL_LOCAL"] else 0
    user = word >> 44 & 0xFFFF if flags & _MPOL_KEEPS_MASK else 0
    return Policy(mode, flags, -1 if home == 0xFF else home, nodes, user)


_MPOL_KEEPS_MASK: Final = 0xC000
_MPOL_MODE_FLAGS: Final = 0xE000


def _mbind(args: dict[str, int], seen: Seen) -> Request:
    mode = _int(args["mode"])
    args["flags"] = _uint(args["flags"])
    if mode & ~_MPOL_MODE_FLAGS == 0:
        return Operation("mbind", args, {"policy": None})
    page = seen.page_size
    start, end = args["start"], args["start"] + (args["len"] + page - 1 & ~(page - 1))
    for vma in seen.after:
        policy = vma.policy
        if vma.start < end and start < vma.end and isinstance(policy, Policy) and _is_asked(policy, mode):
            return Operation("mbind", args, {"policy": policy})
    if seen.result < 0 or end == start:
        return Operation("mbind", args, {"policy": UNKNOWN})
    return Open("the nodes of the policy were not read")


def _is_asked(policy: Policy, mode: int) -> bool:
    """Whether a policy can come from this mode argument: an empty preferred one turns into local."""
    wanted = mode & ~_MPOL_MODE_FLAGS
    return policy.mode == wanted or wanted == 1 and policy.mode == 4


def _home_node(args: dict[str, int], seen: Seen) -> Request:
    inputs = {} if seen.result != -22 else {"node_online": False}
    return Operation("set_mempolicy_home_node", args, inputs)


def _prctl(args: dict[str, int], seen: Seen) -> Request:
    option = args["option"] = _int(args["option"])
    if option == _PR_SET_MM:
        return Skip("prctl")
    inputs: dict[str, Any] = {}
    if option == _PR_SET_VMA and args["arg5"]:
        start = args["arg3"]
        found = next((v for v in seen.after if v.start <= start < v.end), None)
        if found is not None and found.name is not None:
            inputs["name"] = found.name
        else:
            inputs["name"] = UNKNOWN
    return Operation("prctl", args, inputs)


def _ioctl(args: dict[str, int], seen: Seen) -> Request:
    number = args["cmd"] & 0xFF
    if number not in (_UFFDIO_REGISTER, _UFFDIO_UNREGISTER):
        return Skip("uffd")
    start, length, mode = seen.args[3], seen.args[4], seen.args[5]
    if start == length == mode == 0:
        return Open("the range of the userfaultfd ioctl is not in the trace")
    rows = seen.after if number == _UFFDIO_REGISTER else seen.before
    found = {v.uffd for v in rows if v.start < start + length and start < v.end and v.uffd is not None}
    inputs: dict[str, Any] = {"uffd": found.pop()} if len(found) == 1 else {"uffd": UNKNOWN}
    if number == _UFFDIO_UNREGISTER:
        return Operation("uffd_unregister", {"start": start, "len": length}, inputs)
    return Operation("uffd_register", {"start": start, "len": length, "mode": mode}, inputs)


def _shmat(args: dict[str, int], seen: Seen) -> Request:
    args["shmflg"] = _int(args["shmflg"])
    if seen.result < 0:
        return Open("the size of the segment is not in the trace")
    vma = seen.at(seen.result)
    if vma is None or not isinstance(vma.file, int):
        return seen.no_file(seen.result)
    file = FileGiven(vma.file, writable=not args["shmflg"] & SHM_RDONLY)
    return Operation("shmat", args, {"picked": seen.result, "size": vma.end - vma.start, "file": file})


def _io_setup(args: dict[str, int], seen: Seen) -> Request:
    if len(seen.born) != 1:
        return Open("the aio ring was not seen")
    start, end = next(iter(seen.born.values()))
    vma = seen.at(start)
    if vma is None or not isinstance(vma.file, int):
        return Open("the aio ring was not read")
    given = seen.files.given(vma.file, True, True)
    noexec = not isinstance(given, str) and given.noexec
    file = FileGiven(vma.file, noexec=noexec)
    return Operation("io_setup", args, {"picked": start, "size": end - start, "file": file})


def _map_shadow_stack(args: dict[str, int], seen: Seen) -> Request:
    return Operation("map_shadow_stack", args, {"picked": seen.result} if seen.result >= 0 else {})


def _ipc(args: dict[str, int], seen: Seen) -> Request:
    what = args["call"] & 0xFFFF
    if what == 21:
        return Open("shmat through ipc: its result is in user memory")
    if what == 22:
        return Operation("shmdt", {"shmaddr": args["ptr"]})
    return Skip("prctl")


_MAKERS: Final[dict[str, Callable[[dict[str, int], Seen], Request]]] = {
    "mmap": _mmap,
    "mmap2": _mmap,
    "old_mmap": _old_mmap,
    "mremap": _mremap,
    "madvise": _madvise,
    "process_madvise": _process_madvise,
    "mlock2": _mlock2,
    "mlockall": _plain("mlockall", "flags"),
    "mbind": _mbind,
    "set_mempolicy_home_node": _home_node,
    "pkey_mprotect": _plain("pkey_mprotect", "pkey"),
    "prctl": _prctl,
    "ioctl": _ioctl,
    "shmat": _shmat,
    "io_setup": _io_setup,
    "map_shadow_stack": _map_shadow_stack,
    "ipc": _ipc,
}
