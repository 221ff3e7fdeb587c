"""Reads scenario files: one JSON object a line, checked field by field, errors naming FILE:LINE."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vmatrace.errors import UsageError
from vmatrace.rules.model import NO_LIMIT, Config, Limits, MmState, Operation
from vmatrace.scenario.operations import parse_operation
from vmatrace.scenario.values import (
    ADDRESS_END,
    as_address,
    as_bool,
    as_flags,
    as_identity,
    as_list,
    as_numbers,
    as_pages,
    as_policy,
    as_text,
    is_number,
    known_keys,
)
from vmatrace.vma import Vma

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
_EXPECTED_NUMBERS: Final = ("ret", "map_count", "locked_vm", "total_vm", "data_vm", "stack_vm")
_EXPECT_KEYS: Final = frozenset(("outcome", "errno", "vmas", *_EXPECTED_NUMBERS))
_STDIN: Final = Path("-")
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
    kernel: str = ""


def read_scenarios(path: Path) -> Iterator[Scenario | UsageError]:
    """The scenarios of a file (``-``: standard input), one a line; a bad line comes as the error to raise, naming
    FILE:LINE."""
    try:
        text = sys.stdin.read() if path == _STDIN else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}", "name a .jsonl file"
        ) from error
    # Not splitlines, which also cuts at characters that may stand in a JSON text.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}:{number}"
        try:
            yield parse_scenario(line, where)
        except UsageError as error:
            yield UsageError(f"{where}: {error.message}", error.hint)


def parse_scenario(line: str, where: str = "") -> Scenario:
    """One scenario from its JSON text. Raises UsageError that says what is wrong."""
    data = _parse_json(line)
    if not isinstance(data, dict):
        raise UsageError("a scenario is a JSON object")
    known_keys(data, _SCENARIO_KEYS, "field")
    page_size = data.get("page_size", 4096)
    if not is_number(page_size) or not 512 <= page_size <= 1 << 30 or page_size & (page_size - 1):
        raise UsageError(f"page_size {page_size!r} is no power of two")
    limits = _parse_limits(data.get("limits", {}), page_size, _parse_config(data.get("config", {})))
    vmas = tuple(_parse_vma(item, i, page_size) for i, item in enumerate(as_list(data.get("vmas", []), "vmas")))
    _check_layout(vmas)
    source = data.get("source", "derived")
    if source not in _SOURCES:
        raise UsageError(f"source {source!r} is none of {', '.join(_SOURCES)}")
    rules = data.get("rules", [])
    names = [rules] if isinstance(rules, str) else as_list(rules, "rules")
    # How many VMAs there are is known for the first step only.
    steps = tuple(_parse_step(item, None if i else len(vmas), page_size) for i, item in enumerate(_steps_of(data)))
    return Scenario(
        str(data.get("name", where)), vmas, steps, limits, _parse_mm(data.get("mm", {})),
        source, where, tuple(as_text(name, "rules:") for name in names), as_text(data.get("kernel", ""), "kernel"),
    )  # fmt: skip


def _parse_json(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError("not JSON: a number or a nesting without end") from error


def _steps_of(data: Mapping[str, Any]) -> list[Any]:
    if ("operation" in data) == ("steps" in data):
        raise UsageError("a scenario has either an operation or steps")
    steps = as_list(data["steps"], "steps") if "steps" in data else [data]
    if not steps:
        raise UsageError("steps is empty")
    return steps


def _parse_mm(value: object) -> dict[str, int]:
    fields = as_numbers(value, "mm")
    known_keys(fields, MmState.__dataclass_fields__, "field of mm")
    return fields


def _parse_config(value: object) -> Config:
    config = as_numbers(value, "config")
    known_keys(config, Config.__dataclass_fields__, "config")
    return Config(**{key: as_bool(on, key) for key, on in config.items()})


def _parse_limits(value: object, page_size: int, config: Config) -> Limits:
    limits = dict(as_numbers(value, "limits"))
    known = set(Limits.__dataclass_fields__) - {"config", "page_size"}
    known_keys(limits, known, "limit")
    for key in ("can_lock", "read_implies_exec"):
        if key in limits:
            limits[key] = as_bool(limits[key], key)
    for key, number in limits.items():
        if key.startswith("rlimit") and number < 0:
            limits[key] = NO_LIMIT
    plain: Any = limits
    return replace(Limits(page_size=page_size, config=config), **plain)


def _parse_vma(item: object, index: int, page_size: int) -> Vma:
    if not isinstance(item, dict):
        raise UsageError(f"VMA {index} is not an object")
    try:
        known_keys(item, _VMA_KEYS, "field")
        start, end = as_address(item, "start", page_size), as_address(item, "end", page_size, ADDRESS_END + 1)
        if start >= end:
            raise UsageError(f"empty range [{start:#x}, {end:#x})")
        file, close = as_identity(item.get("file")), as_bool(item.get("close", False), "close")
        anonymous = as_bool(item.get("anonymous", file is None and not close), "anonymous")
        second = item.get("anon_pgoff")
        return Vma(
            start, end, as_flags(item.get("flags", []), "flags"),
            as_pages(item.get("pgoff", start // page_size), "pgoff"), file, anonymous, close,
            as_identity(item.get("anon_vma")), as_bool(item.get("forked", False), "forked"),
            as_identity(item.get("uffd")), as_policy(item.get("policy")), as_identity(item.get("name")), index,
            as_text(item.get("kind", ""), "kind"), None if second is None else as_pages(second, "anon_pgoff"),
            as_pages(item.get("huge_size", 0), "huge_size"),
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


def _parse_step(item: object, count: int | None, page_size: int) -> Step:
    if not isinstance(item, dict) or not isinstance(item.get("operation"), dict):
        raise UsageError("operation is not an object")
    operation = parse_operation(item["operation"], count, page_size)
    expect = item.get("expect")
    if expect is not None:
        _check_expectation(expect, page_size)
    return Step(operation, expect)


def _check_expectation(expect: object, page_size: int) -> None:
    if not isinstance(expect, dict):
        raise UsageError("expect is not an object")
    known_keys(expect, _EXPECT_KEYS, "field of expect")
    for key, value in expect.items():
        if key in _EXPECTED_NUMBERS and not is_number(value):
            raise UsageError(f"expect: {key} {value!r} is no number")
        if key in ("outcome", "errno") and value is not None:
            as_text(value, f"expect: {key}")
    try:
        for i, vma in enumerate(as_list(expect.get("vmas", []), "vmas")):
            _parse_vma(vma, i, page_size)
    except UsageError as error:
        raise UsageError(f"expect: {error.message}", error.hint) from error
