"""What a failing address space went through: the calls, faults and forks that shaped a neighbourhood, as steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vmatrace.ingest import Operation, Trace
from vmatrace.ingest.match import KIND_NAMES
from vmatrace.replay.result import Verdict
from vmatrace.rules.constants import MAP_FIXED, MAP_FIXED_NOREPLACE, MREMAP_FIXED
from vmatrace.vma import Vma

CALL: Final = "call"
TOUCH: Final = "touch"
FORK: Final = "fork"
# Calls that act on the whole address space, or decide what later ones may do.
_EVERYWHERE: Final = frozenset(("mlockall", "munlockall", "prctl", "personality", "setrlimit", "prlimit64"))
# The argument names of an address and of the length that goes with it.
_RANGES: Final[dict[str, tuple[str, str]]] = {
    "mmap": ("addr", "len"), "munmap": ("addr", "len"), "mprotect": ("start", "len"),
    "pkey_mprotect": ("start", "len"), "mremap": ("addr", "old_len"), "madvise": ("start", "len_in"),
    "mlock": ("start", "len"), "mlock2": ("start", "len"), "munlock": ("start", "len"), "mbind": ("start", "len"),
    "set_mempolicy_home_node": ("start", "len"), "mseal": ("start", "len"), "remap_file_pages": ("start", "size"),
}  # fmt: skip
_MOST_STEPS: Final = 3_000


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened, addresses still those of the trace.

    ``kind``: call, touch (a write fault at ``args["addr"]``) or fork (what follows is the child's).
    ``file``: what an mmap mapped, None where it is anonymous or not known.
    """

    kind: str
    name: str = ""
    args: dict[str, int] = field(default_factory=dict)
    file: object = None

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The stretches of addresses that it names."""
        if self.kind == TOUCH:
            yield self.args["addr"], self.args["addr"] + 1
        elif self.name in _RANGES:
            at, length = (self.args[name] for name in _RANGES[self.name])
            yield at, at + max(length, 1)
            if self.name == "mremap" and self.args["flags"] & MREMAP_FIXED:
                yield self.args["new_addr"], self.args["new_addr"] + max(self.args["new_len"], 1)


def steps_to(trace: Trace, verdict: Verdict) -> list[Step]:
    """The steps that matter to the neighbourhood of a divergence, the diverging call last.

    Goes back through the space and through those it was forked from; a move into the neighbourhood makes
    where it came from matter too.
    """
    shapes = [edge for _, vmas in verdict.layouts for vma in vmas for edge in vma[:2]]
    wanted = [(min(shapes) - trace.page_size, max(shapes) + trace.page_size)] if shapes else []
    steps: list[Step] = []
    space, last = verdict.space, verdict.op
    while len(steps) < _MOST_STEPS:
        steps += _backwards(trace, space, last, wanted, _MOST_STEPS - len(steps))
        about = trace.spaces[space]
        if about.origin != "fork" or about.parent is None or about.fork_task is None:
            break
        steps.append(Step(FORK))
        parent = trace.operation_rows(about.parent)
        order = trace.operations.order
        last = sum(int(order[row]) < about.fork_task["index"] for row in parent) - 1
        space = about.parent
    return _with_touches_of_parents(steps[::-1])


def _backwards(trace: Trace, space: int, last: int, wanted: list[tuple[int, int]], most: int) -> list[Step]:
    rows = trace.operation_rows(space)
    found: list[Step] = []
    first = last
    while first >= 0 and len(found) < most:
        operation = _call(trace, rows[first])
        step = None if operation is None else _step(operation)
        if operation is not None and step is not None:
            mine = list(step.ranges())
            if first == last or step.name in _EVERYWHERE or _overlap(mine, wanted):
                wanted += [] if step.name in _EVERYWHERE else mine
                found.append(step)
                found += _touches(operation, wanted)
        first -= 1
    return found


def _call(trace: Trace, row: int) -> Operation | None:
    return trace.operation(row) if KIND_NAMES[trace.operations.kind[row]] == CALL else None


def _overlap(mine: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> bool:
    return any(lo < high and low < hi for lo, hi in mine for low, high in wanted)


def _step(operation: Operation) -> Step | None:
    """A call as a step; where the kernel chose a place, the step asks for that place."""
    args, result = dict(operation.args), operation.result or -1
    if operation.name not in _RANGES and operation.name not in _EVERYWHERE:
        return None
    if operation.name == "mmap" and not args["flags"] & (MAP_FIXED | MAP_FIXED_NOREPLACE) and result > 0:
        args["addr"] = result
    if operation.name == "mremap" and not args["flags"] & MREMAP_FIXED and 0 < result != args["addr"]:
        args |= {"flags": args["flags"] | MREMAP_FIXED, "new_addr": result}
    if operation.name in ("setrlimit", "prlimit64"):
        args |= {"soft": operation.raw_args[4], "hard": operation.raw_args[5]}
    return Step(CALL, operation.name, args, _file(operation))


def _file(operation: Operation) -> object:
    if operation.name != "mmap" or operation.result is None or operation.result < 0:
        return None
    for vma in _rows(operation, before=False):
        if vma.start <= operation.result < vma.end:
            return vma.file
    return None


def _rows(operation: Operation, before: bool) -> Iterator[Vma]:
    for section in operation.sections:
        for walk in section.before if before else section.after:
            yield from walk.vmas


def _touches(operation: Operation, wanted: list[tuple[int, int]]) -> list[Step]:
    """What must have been faulted before the call: VMAs there with an anon_vma (those too that had it long before)."""
    first = operation.sections[:1]
    vmas = [vma for section in first for walk in section.before for vma in walk.vmas]
    return [
        Step(TOUCH, args={"addr": vma.start, "forked": int(vma.forked)})
        for vma in vmas
        if vma.anon_vma is not None and _overlap([(vma.start, vma.end)], wanted)
    ]


def _with_touches_of_parents(steps: list[Step]) -> list[Step]:
    """A fork child's inherited anon_vma was gained before the fork: its touch moves there."""
    found: list[Step] = []
    for step in steps:
        if step.kind == TOUCH and step.args.pop("forked"):
            forks = [at for at, other in enumerate(found) if other.kind == FORK]
            found.insert(forks[-1] if forks else len(found), step)
        elif found[-1:] != [step]:
            found.append(step)
    return found
