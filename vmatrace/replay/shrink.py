"""Finds the fewest steps that repeat a divergence on the running kernel: delta debugging over its history.

Every round is one recording: each candidate runs in a fork child of its own, so it is an address space of its own
in the trace, and one replay tells of all of them whether the divergence is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

from vmatrace.ingest import Trace, errno_name
from vmatrace.kernel import KernelProfile, nearest_release
from vmatrace.replay.engine import run
from vmatrace.replay.history import CALL, FORK, Step, steps_to
from vmatrace.replay.reproducer import can_repeat, repeating_program
from vmatrace.replay.requests import policy_of
from vmatrace.replay.result import ReplayResult, Verdict
from vmatrace.replay.stage import SCENARIO_BASE, Stage, program, stage_of
from vmatrace.scenario import vma_as_json
from vmatrace.timeline import Timeline
from vmatrace.vma import Vma

Repeat = Callable[[str], tuple[Path, str]]
"""Compiles a C program, records it on this kernel, and gives the trace and what the program printed."""

# Of one round: so many candidates, so many steps in all of them.
_MOST_CANDIDATES: Final = 400
_MOST_STEPS: Final = 30_000
_OPTIONS: Final = ("soft_dirty", "anon_vma_name", "numa", "thp", "ksm")


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What is left of a divergence: its steps as C, as a scenario (one JSON line), and how many they are."""

    steps: int
    program: str
    scenario: str
    verdict: Verdict


def shrink(trace: Trace, result: ReplayResult, repeat: Repeat) -> Shrunk | None:
    """The first divergence that this kernel repeats, shrunk; None where it repeats none of the first few."""
    seen: set[tuple[str, str]] = set()
    for verdict in result.failed:
        if verdict.op < 0 or not can_repeat(verdict) or _shape(verdict) in seen:
            continue
        seen.add(_shape(verdict))
        found = _Search(trace, result, verdict, repeat).run()
        if found is not None or len(seen) > 2:
            return found
    return None


def minimal(count: int, fails: Callable[[list[list[int]]], list[bool]]) -> list[int] | None:
    """The fewest of ``count`` steps, the last one among them, that fail still; None where all of them do not.

    ``fails`` tells it of many candidates at once. First suffixes, then ddmin with many granularities a round: a round
    costs much more than a candidate.
    """
    lengths = sorted({count, *(1 << power for power in range(count.bit_length()))})
    suffixes = [list(range(count - length, count)) for length in lengths]
    kept = next((suffix for suffix, bad in zip(suffixes, fails(suffixes), strict=True) if bad), None)
    chunks = 2
    more: list[list[int]] = []
    while kept is not None and len(kept) > 1:
        numbers = _granularities(len(kept) - 1, chunks)
        tried = _candidates(kept, numbers, more)
        failing = [candidate for candidate, bad in zip(tried, fails(tried), strict=True) if bad]
        if failing:
            gone = [set(kept).difference(candidate) for candidate in failing]
            kept, chunks = min(failing, key=len), 2
            more = list(_without_some(kept, gone))
        elif numbers[-1] >= len(kept) - 1:
            break
        else:
            chunks = numbers[-1] * 2
    return kept


def _without_some(kept: list[int], chunks: list[set[int]]) -> Iterator[list[int]]:
    """What is left without all chunks that could go alone, or without many small ones: some may stand for others."""
    chosen = Random(len(kept))
    yield [step for step in kept if not any(step in chunk for chunk in chunks)]
    fewest = min(len(chunk) for chunk in chunks)
    chunks = [chunk for chunk in chunks if len(chunk) == fewest]
    for share, times in ((1.0, 1), (0.9, 8), (0.75, 10), (0.5, 10)):
        for _ in range(times):
            gone = set().union(*(chunk for chunk in chunks if chosen.random() < share))
            yield [step for step in kept if step not in gone]


def _granularities(size: int, chunks: int) -> list[int]:
    """Numbers of chunks to try in one round: this one, and finer ones as long as the round stays small."""
    found = [min(chunks, size)]
    while found[-1] < size and 2 * found[-1] * size <= _MOST_STEPS:
        found.append(min(2 * found[-1], size))
    return found


def _candidates(kept: list[int], numbers: list[int], more: list[list[int]]) -> list[list[int]]:
    """What is left when one of the chunks goes, or one alone stays, and ``more``; the last step always stays."""
    head, last = kept[:-1], kept[-1]
    found = dict.fromkeys(tuple(candidate) for candidate in more if candidate[-1:] == [last])
    for number in numbers:
        edges = sorted({len(head) * i // number for i in range(number + 1)})
        for low, high in pairwise(edges):
            found[(*head[:low], *head[high:], last)] = None
            found[(*head[low:high], last)] = None
    return [list(candidate) for candidate in found if len(candidate) < len(kept)]


def _shape(verdict: Verdict) -> tuple[str, str]:
    """What two divergences of one kind have in common: the call and the reason without its numbers."""
    return verdict.syscall, re.sub(r"0x[0-9a-f]+|\b\d+\b", "#", verdict.reason)


class _Search:
    """The search for the smallest form of one divergence."""

    def __init__(self, trace: Trace, result: ReplayResult, verdict: Verdict, repeat: Repeat) -> None:
        self.rules, self.without = result.rules.name, result.without
        self.repeat = repeat
        self.shape = _shape(verdict)
        self.steps = steps_to(trace, verdict)
        self.stage = stage_of(trace, self.steps)

    def run(self) -> Shrunk | None:
        kept = minimal(len(self.steps), self._fails)
        if kept is None:
            return None
        path, printed = self.repeat(program(self.stage, self.steps, [kept]))
        trace = Trace(path)
        verdict = self._diverging(trace, 1).get(0)
        if verdict is None:
            return None
        last = _Final(trace, verdict, self.stage, [self.steps[number] for number in kept], int(printed.split()[0], 16))
        return Shrunk(len(kept), last.program(), json.dumps(last.scenario()), verdict)

    def _fails(self, candidates: list[list[int]]) -> list[bool]:
        answers: list[bool] = []
        while len(answers) < len(candidates):
            batch = list(_batch(candidates[len(answers) :]))
            path, _ = self.repeat(program(self.stage, self.steps, batch))
            found = self._diverging(Trace(path), len(batch))
            answers += [number in found for number in range(len(batch))]
        return answers

    def _diverging(self, trace: Trace, count: int) -> dict[int, Verdict]:
        """The first divergence of the shape looked for, by the number of the candidate."""
        candidates = _candidate_of(trace, count)
        found: dict[int, Verdict] = {}
        for verdict in run(trace, self.rules, self.without).failed:
            number = candidates.get(verdict.space)
            if number is not None and verdict.op >= 0 and _shape(verdict) == self.shape:
                found.setdefault(number, verdict)
        return found


def _batch(candidates: Iterable[list[int]]) -> Iterator[list[int]]:
    steps = 0
    for number, candidate in enumerate(candidates):
        steps += len(candidate)
        if number and (number >= _MOST_CANDIDATES or steps > _MOST_STEPS):
            return
        yield candidate


def _candidate_of(trace: Trace, count: int) -> dict[int, int]:
    """Which candidate each address space belongs to: the children of the program in order, and theirs."""
    spaces = sorted(trace.spaces.values(), key=lambda space: space.index)
    parents = [space.parent for space in spaces if space.parent is not None]
    if not parents:
        return {}
    stage = max(set(parents), key=lambda parent: sum(parent == other for other in parents) if count > 1 else -parent)
    found: dict[int, int] = {}
    for space in spaces:
        if space.parent == stage:
            found[space.id] = len(set(found.values()))
        elif space.parent in found:
            found[space.id] = found[space.parent]
    return found


class _Final:
    """The last recording, of the smallest candidate alone, told as a program and as a scenario."""

    def __init__(self, trace: Trace, verdict: Verdict, stage: Stage, steps: Sequence[Step], area: int) -> None:
        self.trace, self.verdict, self.stage, self.steps, self.area = trace, verdict, stage, steps, area

    def _in_area(self, vmas: Iterable[Vma]) -> tuple[Vma, ...]:
        high = self.area + self.stage.places.length
        return tuple(vma for vma in vmas if self.area <= vma.start < high)

    def _state(self, space: int, op: int) -> tuple[Vma, ...]:
        return self._in_area(Timeline(self.trace, space).at_op(op).vmas) if op >= 0 else ()

    def program(self) -> str:
        """The steps as a program that says whether the kernel does as the rules expect, or as was seen."""
        verdict = self.verdict
        layouts = dict(verdict.layouts)
        observed = self._state(verdict.space, verdict.op)
        near = [edge for vmas in layouts.values() for vma in vmas for edge in vma[:2]]
        expected = [vma for vma in observed if vma.end <= min(near) or vma.start >= max(near)]
        whole = {
            "before": self._state(verdict.space, verdict.op - 1),
            "expected": tuple(sorted([*expected, *self._in_area(layouts["expected"])])),
            "observed": observed,
        }
        statements = [self.stage.statement(step) for step in self.steps]
        return repeating_program(
            verdict, self.trace, whole, self.area, self.stage.places.length, statements
        )

    def scenario(self) -> dict[str, Any]:
        """The steps as a scenario: what this kernel did after each is what is expected."""
        profile = KernelProfile.from_dict(self.trace.kernel)
        release, edits = nearest_release(profile.rule_set().features)
        known = {name: profile.config[name].value for name in _OPTIONS if name in profile.config}
        return {
            "name": f"{self.verdict.syscall}: {self.verdict.reason}",
            "source": "kernel",
            "rules": [release + "".join(edits)],
            "page_size": self.trace.page_size,
            "config": {name: value for name, value in known.items() if value is not None},
            "vmas": [],
            "steps": list(self._scenario_steps()),
        }

    def _scenario_steps(self) -> Iterator[dict[str, Any]]:
        for step, (space, op) in zip(self.steps, self._operations(), strict=False):
            result = self.trace.operation(self.trace.operation_row(space, op)).result if step.kind == CALL else 0
            operation = self.stage.scenario(step, result)
            if operation is None:
                continue
            expect: dict[str, Any] = {}
            if step.kind == CALL:
                vmas = [self._moved(vma) for vma in self._state(space, op)]
                expect = {"expect": {"errno": errno_name(result), "vmas": vmas}}
                policy = next((vma["policy"] for vma in vmas if "policy" in vma), None)
                if step.name == "mbind" and policy is not None:
                    operation["policy"] = policy
            yield {"operation": operation, **expect}

    def _operations(self) -> Iterator[tuple[int, int]]:
        """The operation of each step, by its address space and number there; touches stand at the last one."""
        spaces = self._lineage()
        space, op = spaces.pop(0), -1
        for step in self.steps:
            if step.kind == CALL:
                op = self._next(space, op, step.name)
            elif step.kind == FORK:
                space, op = spaces.pop(0), -1
            yield space, op

    def _next(self, space: int, op: int, name: str) -> int:
        rows = self.trace.operation_rows(space)
        return next(n for n in range(op + 1, len(rows)) if self.trace.operation(rows[n]).name == name)

    def _lineage(self) -> list[int]:
        """The spaces from the candidate's first to the one that diverged."""
        candidates = _candidate_of(self.trace, 1)
        found = [self.verdict.space]
        while (parent := self.trace.spaces[found[0]].parent) in candidates and parent is not None:
            found.insert(0, parent)
        return found

    def _moved(self, vma: Vma) -> dict[str, Any]:
        """A VMA at the scenario's addresses, identities left out: the rules give names of their own."""
        base = SCENARIO_BASE - self.area
        if isinstance(vma.policy, int):
            vma = vma._replace(policy=policy_of(vma.policy))
        told = vma_as_json(vma._replace(start=vma.start + base, end=vma.end + base))
        if vma.file is None:
            told["pgoff"] += base // self.trace.page_size
        for name in ("file", "close", "anon_vma", "uffd", "anonymous"):
            told.pop(name, None)
        return told
