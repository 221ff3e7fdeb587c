"""Runs scenarios: each step in one address space, its outcome named and compared with what is expected."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vmatrace.errors import UsageError
from vmatrace.kernel import RuleSet
from vmatrace.rules.accounting import counters_of
from vmatrace.rules.model import (
    Copy,
    Grow,
    Merge,
    New,
    Operation,
    Policy,
    Result,
    Shrink,
    Split,
    Unmap,
    Unmodelled,
)
from vmatrace.scenario.parse import Scenario, Step
from vmatrace.scenario.values import as_identity
from vmatrace.simulator import STEPS, apply
from vmatrace.vma import SEALED, SEALED_OLD, AddressSpace, Vma, flag_names


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one step. ``agrees`` is None where nothing was expected."""

    name: str
    outcome: str
    errno: str | None
    before: tuple[Vma, ...]
    vmas: tuple[Vma, ...]
    agrees: bool | None
    rules: tuple[str, ...]
    differences: tuple[str, ...] = ()
    features_asked: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The object that ``vmatrace simulate --format json`` prints for it."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "errno": self.errno,
            "vmas": [vma_as_json(vma) for vma in self.vmas],
            "agrees": self.agrees,
            "rules": list(self.rules),
        }


def vma_as_json(vma: Vma) -> dict[str, Any]:
    """A VMA in the scenario format."""
    described: dict[str, Any] = {
        "start": vma.start,
        "end": vma.end,
        "pgoff": vma.pgoff,
        "flags": flag_names(vma.flags),
        "file": _plain(vma.file),
        "close": vma.close,
        "anon_vma": _plain(vma.anon_vma),
        "forked": vma.forked,
    }
    for key in ("uffd", "policy", "name"):
        if getattr(vma, key) is not None:
            described[key] = _plain(getattr(vma, key))
    if vma.anonymous is not (vma.file is None and not vma.close):
        described["anonymous"] = vma.anonymous
    return described


def _plain(identity: object) -> object:
    if isinstance(identity, Policy):
        return list(identity)
    if isinstance(identity, tuple):
        return " ".join(str(part) for part in identity)
    return f"new{-identity}" if isinstance(identity, int) and identity < 0 else identity


_MERGES: Final = {"left": "merge_left", "right": "merge_right", "both": "merge_both"}


def outcome_of(name: str, result: Result) -> str:
    """The one word for what an operation did."""
    if result.errno is not None:
        return "none" if name in ("merge_new", "expand_only") else "error"
    if name in ("munmap", "modify") and not result.count(Merge):
        return "split" if result.count(Split) else "none"
    kinds = {type(effect): effect for effect in reversed(result.effects)}
    merge = kinds.get(Merge)
    if isinstance(merge, Merge):
        if name in ("merge_extend", "expand_only") and merge.side == "left":
            return "expand"
        if name != "expand":
            return _MERGES[merge.side]
    for kind, word in ((New, "new"), (Copy, "copy"), (Grow, "expand"), (Shrink, "shrink"), (Split, "split")):
        if kind in kinds:
            return word
    return "unmap" if Unmap in kinds and name not in ("munmap", "mmap_region") else "none"


def run_scenario(scenario: Scenario, rules: RuleSet, disabled: Collection[str] = ()) -> list[Outcome]:
    """Run every step of a scenario in one address space and compare each with what is expected."""
    space = AddressSpace(_prepared(vma, rules, scenario.limits.shift) for vma in scenario.vmas)
    mm = counters_of(space, scenario.limits.page_size)
    for key, value in scenario.mm.items():
        setattr(mm, key, value)
    outcomes = []
    for number, step in enumerate(scenario.steps, 1):
        name = scenario.name if len(scenario.steps) == 1 else f"{scenario.name} step {number}"
        before = tuple(space)
        try:
            result = apply(space, _own_operation(step.operation, rules), rules, mm, scenario.limits, disabled)
        except Unmodelled as unknown:
            raise UsageError(f"{scenario.where or name}: {step.operation.name}: {unknown.reason}") from unknown
        outcomes.append(_judge(name, step, result, before))
        if result.child is not None and result.child_mm is not None and step.operation.args.get("follow"):
            space, mm = result.child, result.child_mm
    return outcomes


def _own_operation(operation: Operation, rules: RuleSet) -> Operation:
    """A bare step's flags are the kernel's bits too."""
    if operation.name not in STEPS or "flags" not in operation.args:
        return operation
    return replace(operation, args={**operation.args, "flags": _own_bits(operation.args["flags"], rules)})


def _own_bits(flags: int, rules: RuleSet) -> int:
    if flags & SEALED and rules.has("mseal") and not rules.has("seal_bit_low"):
        return flags ^ (SEALED | SEALED_OLD)
    return flags


def _prepared(vma: Vma, rules: RuleSet, shift: int) -> Vma:
    """The VMA as this kernel has it: SEALED in its bit, and the usual second page offset where there is one."""
    vma = vma.with_flags(_own_bits(vma.flags, rules))
    if not rules.has("anon_pgoff") or vma.anon_pgoff is not None:
        return vma
    return vma._replace(anon_pgoff=vma.pgoff if vma.file is None else vma.start >> shift)


def _judge(name: str, step: Step, result: Result, before: tuple[Vma, ...]) -> Outcome:
    word = outcome_of(step.operation.name, result)
    followed = result.child is not None and step.operation.args.get("follow")
    after = tuple(result.child if followed and result.child is not None else result.space)
    differences = tuple(_differences(step.expect or {}, word, result, after))
    agrees = None if step.expect is None else not differences
    return Outcome(name, word, result.errno, before, after, agrees, result.rules, differences, result.features_asked)


def _differences(expect: Mapping[str, Any], word: str, result: Result, after: tuple[Vma, ...]) -> Iterator[str]:
    if "outcome" in expect and expect["outcome"] != word:
        yield f"outcome: expected {expect['outcome']}, got {word}"
    if "errno" in expect and expect["errno"] != result.errno:
        yield f"errno: expected {expect['errno']}, got {result.errno}"
    if "ret" in expect and expect["ret"] != result.ret:
        yield f"ret: expected {expect['ret']:#x}, got {result.ret:#x}"
    for key in ("map_count", "locked_vm", "total_vm", "data_vm", "stack_vm"):
        if key in expect and expect[key] != getattr(result.mm, key):
            yield f"{key}: expected {expect[key]}, got {getattr(result.mm, key)}"
    if "vmas" in expect:
        yield from _layout_differences(expect["vmas"], after)


def _layout_differences(expected: list[dict[str, Any]], after: tuple[Vma, ...]) -> Iterator[str]:
    if len(expected) != len(after):
        yield f"VMAs: expected {len(expected)}, got {len(after)}"
        return
    for i, (wanted, vma) in enumerate(zip(expected, after, strict=True)):
        got = {**dict.fromkeys(("uffd", "policy", "name")), "anonymous": vma.anonymous, **vma_as_json(vma)}
        for key, value in wanted.items():
            have = got.get(key, getattr(vma, key, None))
            if key == "flags":
                differs = set(value) != set(have or ())
            else:
                differs = (as_identity(value) if isinstance(value, dict) else value) != have
            if differs:
                yield f"VMA {i} {key}: expected {value}, got {have}"
