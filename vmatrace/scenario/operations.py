"""Reads the operation of a scenario: a bare step or a system call, its fields checked against what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vmatrace.errors import UsageError, nearest
from vmatrace.rules.constants import parse_constant
from vmatrace.rules.model import Operation
from vmatrace.rules.prctl import PR_SET_VMA
from vmatrace.scenario.values import (
    ADDRESS_END,
    WORD_END,
    as_address,
    as_bool,
    as_file,
    as_flags,
    as_identity,
    as_pages,
    as_policy,
    known_keys,
)
from vmatrace.simulator import CALLS, STEPS

# Operation fields that are no arguments of the call, by what they hold.
_IDENTITIES: Final = ("anon_vma", "uffd", "name", "av")
_SWITCHES: Final = ("event_remap", "event_fork", "overcommit_ok", "node_online", "wp_async")
_NUMBERS: Final = ("picked", "rights", "execute_pkey")
_INPUTS: Final = ("file", "policy", *_IDENTITIES, *_SWITCHES, *_NUMBERS)
# Calls whose mapping has a size that is no argument of theirs.
_SIZE_IS_INPUT: Final = ("shmat", "shmdt", "io_setup", "io_destroy")
# Arguments that the kernel takes as signed.
_SIGNED: Final = ("pkey", "shmid", "fd")

#: What each operation must have; a bare step knows no other field but inputs and ``pgoff``.
NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "merge_new": ("start", "end", "flags"),
    "expand_only": ("start", "end", "flags"),
    "modify": ("start", "end", "flags"),
    "merge_extend": ("vma", "delta"),
    "copy_vma": ("vma", "to", "length"),
    "mmap_region": ("start", "end", "flags"),
    "expand": ("vma", "start", "end"),
    "shrink": ("vma", "start", "end"),
    "mmap": ("len", "prot"),
    "munmap": ("addr", "len"),
    "mprotect": ("start", "len", "prot"),
    "pkey_mprotect": ("start", "len", "prot"),
    "mremap": ("addr", "old_len", "new_len"),
    "brk": ("brk",),
    "madvise": ("start", "len_in", "behavior"),
    "mlock": ("start", "len"),
    "mlock2": ("start", "len"),
    "munlock": ("start", "len"),
    "mlockall": ("flags",),
    "munlockall": (),
    "mbind": ("start", "len", "policy"),
    "set_mempolicy_home_node": ("start", "len", "home_node"),
    "mseal": ("start", "len"),
    "prctl": ("option",),
    "shmat": ("size",),
    "shmdt": ("shmaddr",),
    "io_setup": ("size",),
    "io_destroy": ("ctx",),
    "remap_file_pages": ("start", "size"),
    "map_shadow_stack": ("size",),
    "fault": ("address",),
    "populate": ("addr", "len"),
    "expand_stack": ("address",),
    "fork": (),
    "exit": (),
    "create_init_stack": ("top",),
    "relocate_stack": ("start", "shift"),
    "uffd_register": ("start", "len", "mode"),
    "uffd_unregister": ("start", "len"),
    "uffd_release": (),
}


def parse_operation(data: Mapping[str, Any], count: int | None, page_size: int) -> Operation:
    """The operation of one step; ``count`` VMAs are there (None: not known yet). Raises UsageError."""
    name = data.get("op")
    if name == "mmap" and "start" in data:
        name = "mmap_region"
    if not isinstance(name, str) or (name not in STEPS and name not in CALLS):
        near = nearest(str(name), [*STEPS, *CALLS])
        raise UsageError(f"unknown operation {name!r}", f"did you mean {near}?" if near else "")
    args: dict[str, int] = {}
    inputs: dict[str, Any] = {}
    for key, value in data.items():
        if key == "op":
            continue
        if key in _INPUTS or (key == "size" and name in _SIZE_IS_INPUT):
            inputs[key] = _parse_input(name, key, value)
        elif name in STEPS:
            args[key] = _parse_step_field(name, key, value)
        else:
            args[key] = _parse_argument(key, value)
    if name == "munmap" and "start" in args and "end" in args:
        args["addr"] = args.pop("start")
        args["len"] = (args.pop("end") - args["addr"]) % WORD_END
    _check_needed(name, args, inputs)
    if name in STEPS:
        _check_step(name, args, count, page_size)
    return Operation(name, args, inputs)


def _parse_input(name: str, key: str, value: object) -> Any:
    if key == "file":
        return as_identity(value) if name in STEPS else as_file(value)
    if key == "policy":
        return as_policy(value)
    if key in _SWITCHES:
        return as_bool(value, key)
    return as_identity(value) if key in _IDENTITIES or value is None else as_pages(value, key)


def _parse_step_field(name: str, key: str, value: object) -> int:
    known_keys({key: value}, {*NEEDED[name], "pgoff", *_INPUTS}, f"field of {name}")
    return as_flags(value, key) if key == "flags" else as_pages(value, key)


def _parse_argument(key: str, value: object) -> int:
    """A system call's argument, as the register that holds it."""
    number = parse_constant(key, value)
    if not -WORD_END // 2 <= number < WORD_END:
        raise UsageError(f"{key} {number:#x} does not fit in a register")
    return number if key in _SIGNED else number % WORD_END


def _check_needed(name: str, args: Mapping[str, int], inputs: Mapping[str, Any]) -> None:
    needed = NEEDED[name] + (("arg3", "arg4") if args.get("option") == PR_SET_VMA else ())
    for key in needed:
        if key not in args and key not in inputs:
            raise UsageError(f"operation {name} needs {key}")


def _check_step(name: str, args: Mapping[str, int], count: int | None, page_size: int) -> None:
    for key in NEEDED[name]:
        if key not in ("vma", "flags"):
            as_address(args, key, page_size)
        if key in ("delta", "length") and not args[key]:
            raise UsageError(f"{key} is 0")
    if "to" in args and args["to"] + args["length"] > ADDRESS_END:
        raise UsageError(f"{args['to'] + args['length']:#x} is past the end of the address space")
    if count is not None and "vma" in args and args["vma"] >= count:
        raise UsageError(f"there is no VMA number {args['vma']}", f"VMAs are counted from 0 to {count - 1}")
    if "end" in args and args["start"] >= args["end"]:
        raise UsageError(f"empty range [{args['start']:#x}, {args['end']:#x})")
