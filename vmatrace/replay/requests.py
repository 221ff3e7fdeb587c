"""From a recorded system call to the operation that the rules run: arguments by name, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

from vmatrace.replay.files import Files, Unlearnt
from vmatrace.replay.occurrence import Occurrence
from vmatrace.replay.tags import untagged
from vmatrace.rules.constants import (
    MADV,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_TYPE,
    MPOL,
    PROT_EXEC,
    SHM_RDONLY,
)
from vmatrace.rules.madvise import NO_VMA_ADVICE
from vmatrace.rules.model import NO_LIMIT, FileGiven, Operation, Policy
from vmatrace.syscalls import COMPAT
from vmatrace.vma import ACCESS, PKEY_MASK, PKEY_SHIFT, SHARED, Vma

_LOW: Final = 0xFFFFFFFF
_PR_SET_VMA: Final = 0x53564D41
_PR_SET_MM: Final = 35
_UFFDIO_REGISTER: Final = 0x00
_UFFDIO_UNREGISTER: Final = 0x01
_IPC_SHMAT: Final = 21
_IPC_SHMDT: Final = 22
_MPOL_MODE_FLAGS: Final = 0xE000
_MPOL_KEEPS_MASK: Final = 0xC000  # MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES
_HUGE: Final = 2 << 20
_EBADF: Final = 9

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
    "ipc": "ipc about other things than shared memory",
}

#: Stands for an identity that a failed call does not tell.
UNKNOWN: Final = ("unknown",)


class Skip(NamedTuple):
    """The call is of a kind that changes no VMA: a key of SKIPPED_KINDS."""

    kind: str


class Open(NamedTuple):
    """The call cannot be judged; why."""

    reason: str


class Wrong(NamedTuple):
    """What the record says of the call cannot be; why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Learn:
    """The call cannot be judged, but teaches what a driver does: ``operation`` is it without the driver."""

    operation: Operation
    reason: str


Request = Operation | Skip | Open | Wrong | Learn

GUARD_INSTALL: Final = Skip("guard")
_ADVICE: Final = Skip("advice")
_LIMITS: Final = Skip("limits")
LIMIT_CALLS: Final = ("OP_LIMITS", "OP_CREDENTIALS")
"""Classes of calls that change a limit and no VMA."""


class Asked(NamedTuple):
    """What a request is made from: the operation, the files known, and whether nothing can be missing."""

    seen: Occurrence
    result: int
    file: int
    args: tuple[int, ...]
    files: Files
    page: int
    whole: bool
    #: The mm's execute-only protection key, 0: not taken yet.
    execute_pkey: int


def request(seen: Occurrence, files: Files, page: int, whole: bool, execute_pkey: int) -> Request:
    """The operation that a call asks for.

    ``whole``: no record is missing and the state is known. ``execute_pkey``: the mm's execute-only protection
    key as known so far; the inputs ``execute_pkey`` of the operation tell it anew.
    """
    call, entry = seen.call, seen.entry
    if call is None or entry is None:
        return Open(f"{seen.name} is not modelled")
    args = untagged(seen.arch, entry.name, dict(zip(entry.arguments, call.args, strict=False)))
    make = _MAKERS.get(entry.name)
    if make is not None:
        asked = Asked(seen, call.result, call.file, call.args, files, page, whole, execute_pkey)
        return make(args, asked)
    return _LIMITS if entry.op_class in LIMIT_CALLS else Operation(entry.name, args)


def _int(value: int) -> int:
    """A C int from a register."""
    value &= _LOW
    return value - (1 << 32) if value >> 31 else value


def _with_ints(name: str, *keys: str) -> Callable[[dict[str, int], Asked], Request]:
    """A call whose arguments ``keys`` are ints, all else as it is."""

    def make(args: dict[str, int], asked: Asked) -> Request:
        for key in keys:
            args[key] = _int(args[key])
        return Operation(name, args)

    return make


# ---- mmap, shmat, io_setup: what is mapped ----


def _mmap(args: dict[str, int], asked: Asked) -> Request:
    if "pgoff" in args:
        args["off"] = args.pop("pgoff") * 4096  # mmap2 counts in 4 KiB, whatever the page size
    flags = args["flags"]
    if asked.seen.call is not None and asked.seen.call.abi == COMPAT:
        flags = args["flags"] = flags & _LOW
    inputs: dict[str, Any] = {"picked": asked.result} if asked.result >= 0 else {}
    _add_execute_pkey(inputs, args["prot"], asked.result, asked)
    if flags & MAP_ANONYMOUS and not flags & MAP_HUGETLB:
        return Operation("mmap", args, inputs)
    given = _mapped_file(args["prot"], flags, asked) if asked.result >= 0 else _file_of_failed_map(flags, asked)
    if isinstance(given, Open | Wrong):
        return given
    if isinstance(given, Unlearnt):
        inputs["file"] = given.plain
        return Learn(Operation("mmap", args, inputs), given.reason)
    if given is not None:
        inputs["file"] = given
    if flags & MAP_HUGETLB:
        if given is None or not given.huge_size:
            return Open("the huge page size is not known")
        args["flags"] = flags & ~(MAP_ANONYMOUS | MAP_HUGETLB)
    return Operation("mmap", args, inputs)


def _add_execute_pkey(inputs: dict[str, Any], prot: int, address: int, asked: Asked) -> None:
    """The execute-only protection key: what the mm has, else what the first execute-only mapping takes."""
    key = asked.execute_pkey
    if not key and prot & ACCESS == PROT_EXEC and asked.result >= 0:
        vma = asked.seen.after_at(address)
        key = (vma.flags & PKEY_MASK) >> PKEY_SHIFT if vma is not None else 0
    if key:
        inputs["execute_pkey"] = key


def _mprotect(args: dict[str, int], asked: Asked) -> Request:
    inputs: dict[str, Any] = {}
    _add_execute_pkey(inputs, args["prot"], args["start"], asked)
    return Operation("mprotect", args, inputs)


def _pkey_mprotect(args: dict[str, int], asked: Asked) -> Request:
    pkey = args["pkey"] = _int(args["pkey"])
    inputs: dict[str, Any] = {}
    if pkey == -1:
        _add_execute_pkey(inputs, args["prot"], args["start"], asked)
    elif asked.execute_pkey:
        inputs["execute_pkey"] = asked.execute_pkey
    return Operation("pkey_mprotect", args, inputs)


def _mapped_file(prot: int, flags: int, asked: Asked) -> FileGiven | Unlearnt | Open | Wrong:
    vma = asked.seen.after_at(asked.result)
    if vma is None or not isinstance(vma.file, int):
        return _nothing_there(asked)
    if not asked.files.is_described(vma.file):
        reason = "the mapped file is not described in the trace"
        return Wrong(reason) if asked.whole else Open(reason)
    shared = SHARED if flags & MAP_TYPE in (MAP_SHARED, MAP_SHARED_VALIDATE) else 0
    given = asked.files.given(vma.file, prot & ACCESS | shared, not flags & MAP_ANONYMOUS, asked.seen.hook)
    return Open(given) if isinstance(given, str) else given


def _nothing_there(asked: Asked) -> Open | Wrong:
    """No mapped file was read where the call put it; only a look that reached there can tell that there is none."""
    if asked.whole and any(walk.lo <= asked.result < walk.hi for walk in asked.seen.after):
        return Wrong(f"the call returned {asked.result:#x}, where no file is mapped")
    return Open("the mapped file was not read")


def _file_of_failed_map(flags: int, asked: Asked) -> FileGiven | None:
    """The file that a failed mmap was given, None where there was none of that number.

    Where it is not known: one that passes every test of a file.
    """
    if not flags & MAP_ANONYMOUS:
        if asked.result == -_EBADF and not (asked.file and asked.files.can_be_used(asked.file)):
            return None
        given = asked.files.opened(asked.file)
        if given is not None:
            return given
    return FileGiven(UNKNOWN, huge_size=_HUGE if flags & MAP_HUGETLB else 0)


def _old_mmap(args: dict[str, int], asked: Asked) -> Request:
    """The six words of the structure stand where the arguments of the new mmap do."""
    return _mmap(dict(zip(("addr", "len", "prot", "flags", "fd", "off"), asked.args, strict=True)), asked)


def _mremap(args: dict[str, int], asked: Asked) -> Request:
    return Operation("mremap", args, {"picked": asked.result} if asked.result >= 0 else {})


def _shmat(args: dict[str, int], asked: Asked) -> Request:
    args["shmflg"] = _int(args["shmflg"])
    if asked.result < 0:
        size = asked.files.segments.get(args["shmid"])
        if size is None:
            return Operation("shmat", args, {"size": asked.page, "size_is_least": True})
        return Operation("shmat", args, {"size": size})
    vma = asked.seen.after_at(asked.result)
    if vma is None or not isinstance(vma.file, int):
        return _nothing_there(asked)
    asked.files.segments[args["shmid"]] = vma.end - vma.start
    asked.files.attached[vma.file] = vma.end - vma.start
    file = FileGiven(vma.file, writable=not args["shmflg"] & SHM_RDONLY)
    return Operation("shmat", args, {"picked": asked.result, "size": vma.end - vma.start, "file": file})


def _shmdt(args: dict[str, int], asked: Asked) -> Request:
    """The segment's size, which bounds what is detached, is that of its first attach."""
    address = args["shmaddr"]
    for vma in asked.seen.before_in(address, NO_LIMIT):
        if vma.kind == "sysv" and (vma.start - address) // asked.page == vma.pgoff:
            size = asked.files.attached.get(vma.file)
            return Operation("shmdt", args, {} if size is None else {"size": size})
    return Operation("shmdt", args)


def _io_setup(args: dict[str, int], asked: Asked) -> Request:
    if len(asked.seen.born) != 1:
        return Open("the aio ring was not seen")
    start, end = next(iter(asked.seen.born.values()))
    vma = asked.seen.after_at(start)
    if vma is None or not isinstance(vma.file, int):
        return Open("the aio ring was not read")
    given = asked.files.opened(vma.file)
    file = FileGiven(vma.file, noexec=given is not None and given.noexec)
    return Operation("io_setup", args, {"picked": start, "size": end - start, "file": file})


def _map_shadow_stack(args: dict[str, int], asked: Asked) -> Request:
    return Operation("map_shadow_stack", args, {"picked": asked.result} if asked.result >= 0 else {})


def _ipc(args: dict[str, int], asked: Asked) -> Request:
    what = args["call"] & 0xFFFF
    if what == _IPC_SHMAT:
        return Open("shmat through ipc: its result is in user memory")
    return Operation("shmdt", {"shmaddr": args["ptr"]}) if what == _IPC_SHMDT else Skip("ipc")


# ---- advice, policies, names, userfaultfd ----


def _madvise(args: dict[str, int], asked: Asked) -> Request:
    behavior = args["behavior"] = _int(args["behavior"])
    if behavior in NO_VMA_ADVICE or behavior == MADV["MADV_POPULATE_WRITE"]:
        return _ADVICE
    return GUARD_INSTALL if behavior == MADV["MADV_GUARD_INSTALL"] else Operation("madvise", args)


def _process_madvise(args: dict[str, int], asked: Asked) -> Request:
    plain = {"start": asked.args[1], "len_in": asked.args[5], "behavior": args["behavior"]}
    made = _madvise(plain, asked)
    if isinstance(made, Operation) and args["vlen"] != 1:
        return Open("process_madvise of more than one range")
    return made


@cache
def policy_of(word: int) -> Policy | None:
    """The policy that a row's number stands for (policy_content of the BPF programs); None for 0."""
    if not word:
        return None
    mode, flags, home = (word & 0xF) - 1, word >> 4 & 0xFFFF, word >> 20 & 0xFF
    # __mpol_equal looks at the nodes of all modes but LOCAL, and at the user's own where a flag keeps them.
    nodes = word >> 28 & 0xFFFF if mode != MPOL["MPOL_LOCAL"] else 0
    user = word >> 44 & 0xFFFF if flags & _MPOL_KEEPS_MASK else 0
    return Policy(mode, flags, -1 if home == 0xFF else home, nodes, user)


def _mbind(args: dict[str, int], asked: Asked) -> Request:
    mode = _int(args["mode"])
    args["flags"] &= _LOW
    if mode & ~_MPOL_MODE_FLAGS == MPOL["MPOL_DEFAULT"]:
        return Operation("mbind", args, {"policy": None})
    start, end = args["start"], args["start"] + (args["len"] + asked.page - 1 & ~(asked.page - 1))
    for vma in asked.seen.after_in(start, end):
        if isinstance(vma.policy, Policy) and _is_asked_for(vma.policy, mode):
            return Operation("mbind", args, {"policy": vma.policy})
    if asked.result == 0 and not (asked.whole and all(not walk.flags for walk in asked.seen.after)):
        return Open("the nodes of the policy were not read")
    return Operation("mbind", args, {"policy": UNKNOWN})


def _is_asked_for(policy: Policy, mode: int) -> bool:
    """Whether a policy can come from this mode argument: an empty preferred one turns into local."""
    wanted = mode & ~_MPOL_MODE_FLAGS
    empty_preferred = wanted == MPOL["MPOL_PREFERRED"] and policy.mode == MPOL["MPOL_LOCAL"]
    return policy.mode == wanted or empty_preferred


def _home_node(args: dict[str, int], asked: Asked) -> Request:
    inputs = {"node_online": False} if asked.result == -22 else {}
    return Operation("set_mempolicy_home_node", args, inputs)


def _prctl(args: dict[str, int], asked: Asked) -> Request:
    option = args["option"] = _int(args["option"])
    if option == _PR_SET_MM:
        return Skip("prctl")
    inputs: dict[str, Any] = {}
    if option == _PR_SET_VMA and args["arg5"]:
        found = asked.seen.after_at(args["arg3"])
        inputs["name"] = found.name if found is not None and found.name is not None else UNKNOWN
    return Operation("prctl", args, inputs)


def _ioctl(args: dict[str, int], asked: Asked) -> Request:
    number = args["cmd"] & 0xFF
    if number not in (_UFFDIO_REGISTER, _UFFDIO_UNREGISTER):
        return Skip("uffd")
    start, length, mode = asked.args[3:6]
    seen = asked.seen
    rows: list[Vma] = (seen.after_in if number == _UFFDIO_REGISTER else seen.before_in)(start, start + length)
    held = {vma.uffd for vma in rows if vma.uffd is not None}
    inputs: dict[str, Any] = {"uffd": held.pop() if len(held) == 1 else UNKNOWN}
    if number == _UFFDIO_UNREGISTER:
        return Operation("uffd_unregister", {"start": start, "len": length}, inputs)
    return Operation("uffd_register", {"start": start, "len": length, "mode": mode}, inputs)


_MAKERS: Final[dict[str, Callable[[dict[str, int], Asked], Request]]] = {
    "mmap": _mmap,
    "mmap2": _mmap,
    "old_mmap": _old_mmap,
    "mremap": _mremap,
    "madvise": _madvise,
    "process_madvise": _process_madvise,
    "mlock2": _with_ints("mlock2", "flags"),
    "mlockall": _with_ints("mlockall", "flags"),
    "mbind": _mbind,
    "set_mempolicy_home_node": _home_node,
    "mprotect": _mprotect,
    "pkey_mprotect": _pkey_mprotect,
    "prctl": _prctl,
    "ioctl": _ioctl,
    "shmat": _shmat,
    "shmdt": _shmdt,
    "io_setup": _io_setup,
    "map_shadow_stack": _map_shadow_stack,
    "ipc": _ipc,
}
