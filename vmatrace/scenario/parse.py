"""Reads scenario files: one JSON object a line, checked field by field, errors naming FILE:LINE."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vmatrace.errors import UsageError, nearest
from vmatrace.rules.constants import parse_constant
from vmatrace.rules.model import (
    NO_LIMIT,
    Config,
    FileGiven,
    Limits,
    MmState,
    Operation,
    Policy,
)
from vmatrace.simulator import CALLS, STEPS
from vmatrace.vma import Vma, parse_flags

_ADDRESS_END: Final = 1 << 64
_VMA_KEYS: Final = frozenset(
    (
        "start", "end", "pgoff", "flags", "file", "close", "anon_vma", "forked", "uffd", "policy", "name",
        "anonymous", "kind", "anon_pgoff", "huge_size",
    )
)  # fmt: skip
_SCENARIO_KEYS: Final = frozenset(
    (
        "name", "page_size", "vmas", "operation", "expect", "steps", "config", "limits", "source", "kernel",
        "mm", "rules", "comment",
    )
)  # fmt: skip
_EXPECT_KEYS: Final = frozenset(
    (
        "outcome", "errno", "vmas", "ret", "map_count", "locked_vm", "total_vm", "data_vm", "stack_vm",
    )
)  # fmt: skip
# Operation fields that are no arguments of the call.
_INPUT_KEYS: Final = frozenset(
    (
        "file", "anon_vma", "policy", "uffd", "name", "picked", "event_remap", "event_fork",
        "overcommit_ok", "av", "rights", "execute_pkey", "node_online", "wp_async",
    )
)  # fmt: skip
# Calls whose mapping has a size that is no argument of theirs.
_SIZE_IS_INPUT: Final = ("shmat", "shmdt", "io_setup", "io_destroy")
_SOURCES: Final = ("kernel", "kernel-test", "derived")


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a scenario and what is expected of it (None: nothing)."""

    operation: Operation
    expect: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of a scenario file."""

    name: str
    vmas: tuple[Vma, ...]
    steps: tuple[Step, ...]
    limits: Limits
    mm: Mapping[str, int] = field(default_factory=dict)
    source: str = "derived"
    where: str = ""
    rules: tuple[str, ...] = ()


def read_scenarios(path: Path) -> Iterator[Scenario | UsageError]:
    """The scenarios of a file, one a line; a bad line comes as the error to raise, naming FILE:LINE."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}", "name a .jsonl file"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}:{number}"
        try:
            yield parse_scenario(line, where)
        except UsageError as error:
            yield UsageError(f"{where}: {error.message}", error.hint)


def parse_scenario(line: str, where: str = "") -> Scenario:
    """One scenario from its JSON text. Raises UsageError that says what is wrong."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(data, dict):
        raise UsageError("a scenario is a JSON object")
    _known_keys(data, _SCENARIO_KEYS, "field")
    page_size = data.get("page_size", 4096)
    if not isinstance(page_size, int) or page_size < 512 or page_size & (page_size - 1):
        raise UsageError(f"page_size {page_size!r} is no power of two")
    config = _parse_config(data.get("config", {}))
    limits = _parse_limits(data.get("limits", {}), page_size, config)
    vmas = tuple(_parse_vma(item, i, page_size) for i, item in enumerate(_list(data.get("vmas", []), "vmas")))
    _check_layout(vmas)
    if data.get("source", "derived") not in _SOURCES:
        raise UsageError(f"source {data['source']!r} is none of {', '.join(_SOURCES)}")
    rules = data.get("rules", ())
    steps = tuple(_parse_step(item, len(vmas), page_size) for item in _steps_of(data))
    return Scenario(
        str(data.get("name", where)), vmas, steps, limits, _parse_mm(data.get("mm", {})),
        data.get("source", "derived"), where, (rules,) if isinstance(rules, str) else tuple(rules),
    )  # fmt: skip


def _steps_of(data: Mapping[str, Any]) -> list[Any]:
    if ("operation" in data) == ("steps" in data):
        raise UsageError("a scenario has either an operation or steps")
    return _list(data["steps"], "steps") if "steps" in data else [data]


def _known_keys(data: Mapping[str, Any], known: Collection[str], what: str) -> None:
    for key in data:
        if key not in known:
            near = nearest(key, known)
            raise UsageError(f"unknown {what} {key!r}", f"did you mean {near}?" if near else "")


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{what} is not a list")
    return value


def _numbers(value: object, what: str) -> dict[str, int]:
    if not isinstance(value, dict) or not all(isinstance(number, int) for number in value.values()):
        raise UsageError(f"{what} is not an object of numbers")
    return value


def _parse_mm(value: object) -> dict[str, int]:
    fields = _numbers(value, "mm")
    _known_keys(fields, MmState.__dataclass_fields__, "field of mm")
    return fields


def _parse_config(value: object) -> Config:
    config = _numbers(value, "config")
    _known_keys(config, Config.__dataclass_fields__, "config")
    return Config(**{key: bool(on) for key, on in config.items()})


def _parse_limits(value: object, page_size: int, config: Config) -> Limits:
    limits = dict(_numbers(value, "limits"))
    known = set(Limits.__dataclass_fields__) - {"config", "page_size"}
    _known_keys(limits, known, "limit")
    for key in ("can_lock", "read_implies_exec"):
        if key in limits:
            limits[key] = bool(limits[key])
    for key, number in limits.items():
        if key.startswith("rlimit") and number < 0:
            limits[key] = NO_LIMIT
    plain: Any = limits
    return replace(Limits(page_size=page_size, config=config), **plain)


def _address(item: Mapping[str, Any], key: str, page_size: int) -> int:
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{key} is missing or no number" if value is None else f"{key} {value!r} is no number")
    if not 0 <= value < _ADDRESS_END:
        raise UsageError(f"{key} {value:#x} is past the end of the address space")
    if value % page_size:
        raise UsageError(f"{key} {value:#x} is not on a page boundary")
    return value


def _parse_vma(item: object, index: int, page_size: int) -> Vma:
    if not isinstance(item, dict):
        raise UsageError(f"VMA {index} is not an object")
    try:
        _known_keys(item, _VMA_KEYS, "field")
        start, end = _address(item, "start", page_size), _address(item, "end", page_size)
        if start >= end:
            raise UsageError(f"empty range [{start:#x}, {end:#x})")
        flags = parse_flags(_list(item.get("flags", []), "flags"))
        pgoff = item.get("pgoff", start // page_size)
        if not isinstance(pgoff, int) or not 0 <= pgoff < _ADDRESS_END:
            raise UsageError(f"pgoff {pgoff!r} is no page offset")
        file, close = item.get("file"), bool(item.get("close", False))
        anonymous = bool(item.get("anonymous", file is None and not close))
        return Vma(
            start, end, flags, pgoff, file, anonymous, close, item.get("anon_vma"),
            bool(item.get("forked", False)), item.get("uffd"), _parse_policy(item.get("policy")),
            item.get("name"), index, item.get("kind", ""),
            item.get("anon_pgoff"), item.get("huge_size", 0),
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(f"VMA {index}: {error.message}", error.hint) from error


def _check_layout(vmas: Iterable[Vma]) -> None:
    last: Vma | None = None
    for i, vma in enumerate(vmas):
        if last is not None and vma.start < last.end:
            word = "overlaps" if last.start < vma.end else "lies below"
            raise UsageError(f"VMA {i} {word} VMA {i - 1}", "VMAs are listed in order and disjoint")
        if vma.forked and vma.anon_vma is None:
            raise UsageError(f"VMA {i} is forked but has no anon_vma")
        last = vma


def _parse_step(item: object, count: int, page_size: int) -> Step:
    if not isinstance(item, dict) or not isinstance(item.get("operation"), dict):
        raise UsageError("operation is not an object")
    operation = _parse_operation(item["operation"], count, page_size)
    expect = item.get("expect")
    if expect is not None:
        if not isinstance(expect, dict):
            raise UsageError("expect is not an object")
        _known_keys(expect, _EXPECT_KEYS, "field of expect")
        for i, vma in enumerate(_list(expect.get("vmas", []), "expect.vmas")):
            _parse_vma(vma, i, page_size)
    return Step(operation, expect)


# What the bare steps must have; their addresses are page-aligned by nature.
_STEP_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "merge_new": ("start", "end", "flags"),
    "expand_only": ("start", "end", "flags"),
    "modify": ("start", "end", "flags"),
    "merge_extend": ("vma", "delta"),
    "copy_vma": ("vma", "to", "length"),
    "mmap_region": ("start", "end", "flags"),
    "expand": ("vma", "start", "end"),
    "shrink": ("vma", "start", "end"),
}


def _parse_operation(data: Mapping[str, Any], count: int, page_size: int) -> Operation:
    name = data.get("op")
    if name == "mmap" and "start" in data:
        name = "mmap_region"
    if name not in STEPS and name not in CALLS:
        near = nearest(str(name), [*STEPS, *CALLS])
        raise UsageError(f"unknown operation {name!r}", f"did you mean {near}?" if near else "")
    args: dict[str, int] = {}
    inputs: dict[str, Any] = {}
    for key, value in data.items():
        if key == "op":
            continue
        if key in _INPUT_KEYS or (key == "size" and name in _SIZE_IS_INPUT):
            inputs[key] = _parse_input(key, value)
        elif name in STEPS and key == "flags":
            args[key] = parse_flags(_list(value, "flags"))
        else:
            args[key] = parse_constant(key, value)
    if name in STEPS:
        _check_step(name, args, count, page_size)
    elif name == "munmap" and "start" in args and "end" in args:
        args["addr"] = args.pop("start")
        args["len"] = args.pop("end") - args["addr"]
    return Operation(name, args, inputs)


def _parse_input(key: str, value: Any) -> Any:
    """A file may be an object (FileGiven), a policy a list (Policy); all else is an identity as it stands."""
    if key == "file" and isinstance(value, dict):
        return _parse_file(value)
    return _parse_policy(value) if key == "policy" else value


def _parse_policy(value: Any) -> Any:
    if isinstance(value, list):
        if not 1 <= len(value) <= len(Policy._fields) or not all(isinstance(part, int) for part in value):
            raise UsageError(f"policy {value!r} is not [mode, flags, home node, nodes, user nodes]")
        return Policy(*value)
    return value


def _parse_file(value: Mapping[str, Any]) -> FileGiven:
    _known_keys(value, FileGiven.__dataclass_fields__, "field of file")
    fields = dict(value)
    for key in ("set_flags", "clear_flags"):
        if key in fields:
            fields[key] = parse_flags(_list(fields[key], key))
    fields.setdefault("identity", "file")
    return FileGiven(**fields)


def _check_step(name: str, args: Mapping[str, int], count: int, page_size: int) -> None:
    for key in _STEP_FIELDS[name]:
        if key not in args:
            raise UsageError(f"operation {name} needs {key}")
        if key in ("vma", "flags"):
            continue
        _address(args, key, page_size)
    if "vma" in args and not 0 <= args["vma"] < count:
        raise UsageError(f"there is no VMA number {args['vma']}", f"VMAs are counted from 0 to {count - 1}")
    if "end" in args and args["start"] >= args["end"]:
        raise UsageError(f"empty range [{args['start']:#x}, {args['end']:#x})")
