"""Checks single values of a scenario: numbers, addresses, identities, lists, known keys; errors say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping
from typing import Any, Final

from vmatrace.errors import UsageError, nearest
from vmatrace.rules.model import FileGiven, Policy
from vmatrace.vma import parse_flags

#: One past the highest number that a register holds.
WORD_END: Final = 1 << 64
#: One past the highest user address of x86_64 (five page table levels) and of arm64.
ADDRESS_END: Final = 1 << 56


def known_keys(data: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Raise UsageError, naming the nearest, for a key that means nothing."""
    for key in data:
        if key not in known:
            near = nearest(key, known)
            raise UsageError(f"unknown {what} {key!r}", f"did you mean {near}?" if near else "")


def is_number(value: object) -> bool:
    """Whether a value is a whole number (JSON's true and false are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_list(value: object, what: str) -> list[Any]:
    """A list as it stands. Raises UsageError."""
    if not isinstance(value, list):
        raise UsageError(f"{what} is not a list")
    return value


def as_bool(value: object, what: str) -> bool:
    """true, false, 1 or 0. Raises UsageError."""
    if not isinstance(value, int) or value not in (0, 1):
        raise UsageError(f"{what} {value!r} is neither true nor false")
    return bool(value)


def as_text(value: object, what: str) -> str:
    """A text as it stands. Raises UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{what} {value!r} is no text")
    return value


def as_numbers(value: object, what: str) -> dict[str, int]:
    """An object whose values are numbers (or true and false). Raises UsageError."""
    if not isinstance(value, dict) or not all(isinstance(number, int) for number in value.values()):
        raise UsageError(f"{what} is not an object of numbers")
    return value


def as_flags(value: object, what: str) -> int:
    """The bits of a list of flag names. Raises UsageError naming the nearest flags."""
    return parse_flags([as_text(name, f"{what}:") for name in as_list(value, what)])


def as_address(item: Mapping[str, Any], key: str, page_size: int, end: int = ADDRESS_END) -> int:
    """A page-aligned address or length below ``end``. Raises UsageError."""
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{key} is missing or no number" if value is None else f"{key} {value!r} is no number")
    if not 0 <= value < end:
        raise UsageError(f"{key} {value:#x} is past the end of the address space")
    if value % page_size:
        raise UsageError(f"{key} {value:#x} is not on a page boundary")
    return value


def as_pages(value: object, what: str) -> int:
    """A page offset or another count that is never negative. Raises UsageError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < WORD_END:
        raise UsageError(f"{what} {value!r} is no page offset")
    return value


def as_identity(value: object) -> Hashable:
    """What stands for an object (a file, an anon_vma, ...): null and false for none, a structure as its text."""
    if value is None or value is False:
        return None
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True)
    return value if isinstance(value, str | int) else str(value)


def as_policy(value: object) -> Hashable:
    """A policy: a list of its content (`Policy`), or any identity. Raises UsageError."""
    if not isinstance(value, list):
        return as_identity(value)
    if not 1 <= len(value) <= len(Policy._fields) or not all(is_number(part) for part in value):
        raise UsageError(f"policy {value!r} is not [mode, flags, home node, nodes, user nodes]")
    return Policy(*value)


def as_file(value: object) -> FileGiven | None:
    """The file that a call is given: an object of `FileGiven`'s fields, or its identity alone. Raises UsageError."""
    if value is None:
        return None
    if not isinstance(value, dict) or "path" in value:
        return FileGiven(as_identity(value))
    known_keys(value, FileGiven.__dataclass_fields__, "field of file")
    fields: dict[str, Any] = {"identity": "file"}
    for key, given in value.items():
        default = FileGiven.__dataclass_fields__[key].default
        if key in ("identity", "kept"):
            fields[key] = as_identity(given)
        elif key in ("set_flags", "clear_flags"):
            fields[key] = as_flags(given, key)
        elif isinstance(default, bool):
            fields[key] = as_bool(given, key)
        elif isinstance(default, int):
            fields[key] = as_pages(given, key)
        else:
            fields[key] = None if given is None else as_text(given, key)
    return FileGiven(**fields)
