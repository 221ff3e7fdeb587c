"""Whether anything committed notices changed rules: scenarios first, then traces, then the unit tests of the rules."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import pytest

from tests.conformance.mutants import Mutant
from tests.conformance.power import SCENARIOS, TRACES
from vmatrace.ingest import Trace
from vmatrace.kernel import RuleSet, rule_set
from vmatrace.replay import judge, kinds, run
from vmatrace.rules.registry import RULES
from vmatrace.scenario import Scenario, read_scenarios, run_scenario
from vmatrace.simulator import Limits, MmState, Operation, Result, Unmodelled, apply
from vmatrace.vma import AddressSpace

TESTS = Path(__file__).resolve().parents[1]
UNIT_TESTS = tuple(str(path) for path in sorted((TESTS / "unit").glob("test_rules*.py")))
# Seconds of CPU time and bytes that one look may take: a changed loop may never end.
_TIME, _MEMORY = 8, 6 << 30

Called = frozenset[tuple[str, str]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """What a replay asked the simulator, and the answer: (space, operation, rules, mm, limits)."""

    space: AddressSpace
    operation: Operation
    rules: RuleSet
    mm: MmState
    limits: Limits | None
    called: Called
    answer: object

    def is_answered_otherwise(self) -> bool:
        """Whether the rules as they are now give another answer."""
        return self.answer != answer_to(self.space, self.operation, self.rules, self.mm, self.limits)


def answer_to(space: AddressSpace, operation: Operation, rules: RuleSet, mm: MmState, limits: Limits | None) -> object:
    """All that `apply` says and does, comparable."""
    space, mm = space.copy(), mm.copy()
    try:
        result = apply(space, operation, rules, mm, limits)
    except Unmodelled as error:
        return str(error), list(space), mm.snapshot()
    child = result.child and list(result.child), result.child_mm and result.child_mm.snapshot()
    return result.errno, result.ret, result.effects, result.maybe_errnos, list(space), mm.snapshot(), child


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is committed, read once; each piece with the functions of rules that it calls: (module, name)."""

    scenarios: list[tuple[Scenario, RuleSet, Called]]
    #: A trace, how many of its operations passed, and what its replay asked the simulator.
    traces: list[tuple[Trace, int, list[Question]]]
    #: Unit tests of the rules by name.
    tests: list[tuple[str, Callable[[], object], Called]]


def gather() -> Evidence:
    """Read everything; raises AssertionError where it does not agree with the rules as they are."""
    scenarios = []
    for path in SCENARIOS:
        for item in read_scenarios(path):
            assert isinstance(item, Scenario), item
            for name in item.rules:
                rules = rule_set(name)
                disagree, called = _calls_of(partial(_disagrees, item, rules))
                assert not disagree, item.name
                scenarios.append((item, rules, called))
    # What calls little says soonest whether it was changed.
    return Evidence(sorted(scenarios, key=lambda each: len(each[2])), [_judged(path) for path in TRACES], _collected())


def _judged(path: Path) -> tuple[Trace, int, list[Question]]:
    trace, questions = Trace(path), list[Question]()

    def ask(
        space: AddressSpace, operation: Operation, rules: RuleSet, mm: MmState, limits: Limits | None = None,
        disabled: Collection[str] = (),
    ) -> Result:  # fmt: skip
        before = (space.copy(), operation, rules, mm.copy(), limits)
        answer, called = _calls_of(partial(answer_to, *before))
        questions.append(Question(*before, called, answer))
        return apply(space, operation, rules, mm, limits, disabled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "apply", ask)
        patch.setattr(kinds, "apply", ask)
        judged = run(trace)
    assert not judged.failed, path
    return trace, judged.to_json()["passed"], questions


def _calls_of(work: Callable[[], T]) -> tuple[T, Called]:
    called: set[tuple[str, str]] = set()

    def note(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call" and "/vmatrace/rules/" in frame.f_code.co_filename:
            called.add((Path(frame.f_code.co_filename).stem, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        return work(), frozenset(called)
    finally:
        sys.setprofile(None)


def fork_and_look(mutant: Mutant, evidence: Evidence, quick: bool) -> str:
    """What notices the rules with one module's text replaced; empty if nothing does. ``quick``: scenarios only."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        _look_and_leave(mutant, evidence, quick, sender)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return said


def _look_and_leave(mutant: Mutant, evidence: Evidence, quick: bool, sender: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_TIME, _TIME))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        said = look(mutant, evidence, quick)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    os.write(sender, said.encode()[:4000])
    os._exit(0)


def look(mutant: Mutant, evidence: Evidence, quick: bool) -> str:
    """In a process of its own: put the change in place, then ask everything until something notices."""
    if put_in_place(mutant):
        return "docs/rules.md, which is held to what the rules say of themselves"
    noticed = next(_scenarios(mutant, evidence), "")
    if noticed or quick:
        return noticed
    return next(_unit_tests(mutant, evidence), "") or next(_traces(mutant, evidence), "")


def put_in_place(mutant: Mutant) -> bool:
    """Give the functions of the loaded module, which others hold, the code that they have in the changed text.

    Says whether the change is in what a rule says of itself.
    """
    module = import_module(f"vmatrace.rules.{mutant.module}")
    known = dict(RULES)
    changed = types.ModuleType(module.__name__)
    exec(compile(mutant.source, str(module.__file__), "exec"), changed.__dict__)
    registered = known != RULES
    RULES.update(known)
    _take_over(vars(module), vars(changed))
    return registered


def _take_over(old: dict[str, object], new: dict[str, object]) -> None:
    for name, value in new.items():
        was = old.get(name)
        if isinstance(value, property) and isinstance(was, property):
            value, was = value.fget, was.fget
        if isinstance(value, types.FunctionType) and isinstance(was, types.FunctionType):
            was, value = getattr(was, "__wrapped__", was), getattr(value, "__wrapped__", value)
            was.__code__ = value.__code__
            # What is equal stays the same object: some defaults are marks, known by identity.
            pairs = zip(was.__defaults__ or (), value.__defaults__ or (), strict=True)
            was.__defaults__ = tuple(before if before == after else after for before, after in pairs)
            for key, after in (value.__kwdefaults__ or {}).items():
                if was.__kwdefaults__[key] != after:
                    was.__kwdefaults__[key] = after
        elif isinstance(value, type) and isinstance(was, type) and was.__module__ == old.get("__name__"):
            _take_over(dict(vars(was)), dict(vars(value)))
        elif isinstance(value, dict) and isinstance(was, dict) and value != was and not name.startswith("__"):
            was.clear()
            was.update(value)
        elif isinstance(value, int | tuple | frozenset) and value != was:
            old[name] = value


def _disagrees(scenario: Scenario, rules: RuleSet) -> bool:
    return any(outcome.agrees is False for outcome in run_scenario(scenario, rules))


def _scenarios(mutant: Mutant, evidence: Evidence) -> Iterator[str]:
    for scenario, rules, called in evidence.scenarios:
        if mutant.touches(called) and _disagrees(scenario, rules):
            yield f"scenario {scenario.name}"


def _traces(mutant: Mutant, evidence: Evidence) -> Iterator[str]:
    for trace, passed, questions in evidence.traces:
        if any(mutant.touches(question.called) and question.is_answered_otherwise() for question in questions):
            judged = run(trace)
            if judged.failed or judged.to_json()["passed"] < passed:
                yield f"trace {trace.path.name}"


def _unit_tests(mutant: Mutant, evidence: Evidence) -> Iterator[str]:
    for name, test, called in evidence.tests:
        if mutant.touches(called):
            try:
                test()
            except (Exception, pytest.fail.Exception):
                yield f"test {name}"


class _Collector:
    """A plugin that keeps the tests which take nothing but their parameters."""

    def __init__(self) -> None:
        self.tests: list[tuple[str, Callable[[], object]]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            if set(given) == set(item.fixturenames) - {"request"}:
                self.tests.append((item.name, partial(item.obj, **given)))


def _collected() -> list[tuple[str, Callable[[], object], Called]]:
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *UNIT_TESTS], [collector])
    assert status == pytest.ExitCode.OK, status
    return [(name, test, _calls_of(test)[1]) for name, test in collector.tests]
