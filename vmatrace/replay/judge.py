"""Judges one operation: predicts it, compares the prediction with what was seen, and gives the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmatrace.replay import evidence as second
from vmatrace.replay import sync
from vmatrace.replay.doubts import ENDED, LOST, LOST_WITHIN, UNKNOWN_STATE, excuse
from vmatrace.replay.files import LEARNABLE, access_of
from vmatrace.replay.gains import Past
from vmatrace.replay.occurrence import Occurrence, errno_name
from vmatrace.replay.requests import SKIPPED_KINDS, UNKNOWN, Learn, Open, Request, Skip
from vmatrace.replay.result import FAILED, PASSED, SKIPPED, UNDECIDED
from vmatrace.replay.state import SpaceState
from vmatrace.rules.model import FileGiven, ImpossibleInput, Limits, Merge, MmState, New, Operation, Result, Unmodelled
from vmatrace.simulator import RULES, apply
from vmatrace.vma import AddressSpace, Vma

if TYPE_CHECKING:
    from vmatrace.replay.engine import Replayer

_INTERLEAVED: Final = "another thread's write section lies inside the operation"
_KILLED: Final = "EINTR: the task was killed while it waited for the lock"
_UNREAD: Final = "what it changed was not read to the end"

# Calls whose return value the rules give.
_RETURNS: Final = frozenset(("mmap", "brk", "mremap", "shmat", "map_shadow_stack"))
# errnos that depend on what no record holds: overcommit, descriptors, credentials.
_UNCAPTURED: Final[dict[str, tuple[str, ...]]] = {
    "mmap": ("ENOMEM", "EACCES", "ENODEV", "EBADF", "EPERM", "EAGAIN", "ENFILE", "EINVAL"),
    "mprotect": ("ENOMEM",),
    "mremap": ("ENOMEM",),
    "mlock": ("EPERM", "ENOMEM", "EAGAIN"),
    "mlock2": ("EPERM", "ENOMEM", "EAGAIN"),
    "mbind": ("EINVAL", "EPERM", "EFAULT", "EIO"),
    "pkey_mprotect": ("EINVAL",),
    "madvise": ("EAGAIN",),
    "process_madvise": ("EINVAL", "EPERM", "ESRCH", "EBADF", "EFAULT", "EAGAIN"),
    "uffd_register": ("EBADF", "ENOTTY", "EPERM", "EBUSY", "ENOMEM", "EINVAL", "EFAULT"),
    "uffd_unregister": ("EBADF", "ENOTTY", "EINVAL", "ENOMEM", "EFAULT"),
}
# Calls whose uncaptured checks come before those that the rules make.
_CHECKED_LATE: Final = frozenset(("mmap", "mbind", "uffd_register", "uffd_unregister"))
_MERGE_RULES: Final = frozenset(
    id for id, rule in RULES.items() if rule.module in ("vmatrace.rules.mergeable", "vmatrace.rules.merge")
)

Layouts = tuple[tuple[str, tuple[Vma, ...]], ...]


def _is_of_unknown_file(asked: Operation) -> bool:
    """Whether it maps a file of which nothing is known: its hook may fail when the old map is gone already."""
    file = asked.inputs.get("file")
    return isinstance(file, FileGiven) and file.identity == UNKNOWN


class Judge:
    """One operation on its way to a verdict; `judge` and what it calls end with exactly one."""

    def __init__(self, replayer: Replayer, seen: Occurrence, state: SpaceState) -> None:
        self.all = replayer
        self.seen = seen
        self.state = state
        self.result: Result | None = None
        self._saved: tuple[int | bool, ...] = ()
        self.before = sync.read_before(state, seen)

    # ---- ways to a verdict ----

    def judge(self, asked: Request) -> None:
        """Give the verdict of an operation that asks for ``asked``."""
        if isinstance(asked, Operation):
            self._operation(asked)
        elif isinstance(asked, Skip):
            self.skip(asked.kind)
        elif isinstance(asked, Open):
            self.undecided(asked.reason)
        elif isinstance(asked, Learn):
            self._learn(asked)
        else:
            self.failed(asked.reason)

    def skip(self, kind: str) -> None:
        """SKIPPED: the call is of a kind that changes no VMA, and nothing was changed."""
        problem = self.before
        if not problem and self.seen.sections:
            problem = self._unchanged_differs()
            if self.seen.events:
                problem = "a call that changes no VMA changed one"
        if problem:
            self.failed(problem)
            return
        sync.learn_after(self.state, self.seen)
        self.finish(SKIPPED, SKIPPED_KINDS[kind])

    def undecided(self, reason: str) -> None:
        """UNDECIDED; the model becomes what was seen. FAILED where what was read cannot be in any case."""
        self._take_back()
        problem = self.before if reason != LOST else ""
        if not problem and self.seen.sections and not self.seen.changed and not self.seen.lost:
            problem = self._unchanged_differs()
        if problem and not excuse(self):
            self.failed(problem)
            return
        self.adopt()
        self.finish(UNDECIDED, reason)

    def failed(self, problem: str, expected_text: str = "", rules: tuple[str, ...] = ()) -> None:
        """FAILED, or UNDECIDED where lost records may explain it.

        The model becomes what was seen, so that one divergence is one verdict.
        """
        why = excuse(self)
        if why:
            call = self.seen.call
            if why in (LOST_WITHIN, ENDED) and call is not None and call.seq > self.state.seq:
                self.state.forget()
            self._take_back()
            self.adopt()
            self.finish(UNDECIDED, why)
            return
        if self.state.contradicted is not None:
            self.all.contradict(self.state.contradicted, self.state.now, problem)
        result = self.result
        lo, hi = self.span()
        expected = tuple(self.state.space.overlapping(lo, hi))
        self._take_back()
        before = tuple(self.state.space.overlapping(lo, hi))
        self.adopt()
        seen = tuple(self.state.space.overlapping(lo, hi))
        layouts: Layouts = (("before", before), ("expected", expected), ("observed", seen))
        text = expected_text
        if result is not None:
            text = result.errno or ", ".join(str(effect) for effect in result.effects)
        self.finish(FAILED, problem, result.rules if result else rules, text, problem, layouts)

    def finish(
        self,
        verdict: str,
        reason: str,
        rules: tuple[str, ...] = (),
        expected: str = "",
        observed: str = "",
        layouts: Layouts = (),
    ) -> None:
        """Note the verdict."""
        self._remember()
        self.all.note(self.seen, self.state, verdict, reason, rules, expected, observed, layouts)

    def _remember(self) -> None:
        """Keep what was read and changed, which tells later when a fault may have come."""
        space = self.state.space
        walks = [(walk.lo, walk.hi) for walk in (*self.seen.before, *self.seen.after) if not walk.flags]
        history = self.state.history
        events = self.state.events
        if self.seen.downgraded:  # a fault may have been under way when it was read: its event came just before
            events = history[-1].events if history else 0
        history.append(Past(walks, space.journal, events))
        if self.state.taken:
            self.state.let_go(space.journal)
        space.journal = []

    # ---- predicting ----

    def _operation(self, asked: Operation) -> None:
        seen = self.seen
        if seen.interleaved:
            self.undecided(_INTERLEAVED)
        elif self.before:
            self.failed(self.before)
        else:
            self._predict(asked)

    def _predict(self, asked: Operation) -> None:
        state = self.state
        limits = self.limits()
        self._saved = state.mm.snapshot()
        serial = state.space.serial
        try:
            result = apply(state.space, asked, self.all.rules, state.mm, limits, self.all.without)
        except ImpossibleInput as error:
            if state.looked_into_unknown():
                self.undecided(UNKNOWN_STATE)
            else:
                self.failed(error.reason)
            return
        except Unmodelled as error:
            self.undecided(error.reason)
            return
        self.result = result
        if state.looked_into_unknown():
            self.undecided(UNKNOWN_STATE)
            return
        if result.features_asked:
            matter = self._features_that_matter(asked, serial, result, limits)
            if matter:
                self.undecided("the kernel's features are not known: " + ", ".join(matter))
                return
        self._compare(asked, result)

    def limits(self) -> Limits:
        """The limits that hold for this operation."""
        call = self.seen.call
        who = call if call is not None else self.seen.sections[0]
        return self.all.limits.of(who.pid, who.abi)

    def _features_that_matter(
        self, asked: Operation, serial: int, result: Result, limits: Limits
    ) -> list[str]:
        """The unknown features whose values lead to different predictions; what was seen may fit one of them."""
        found = []
        before = self.state.space.copy()
        before.journal = self.state.space.journal
        before.take_back()
        before.serial = serial
        mine = (result.errno, list(self.state.space), self.state.mm.snapshot())
        for feature in result.features_asked:
            space, mm = before.copy(), MmState()
            mm.restore(self._saved)
            rules = self.all.rules.changed(**{feature: True})
            try:
                other = apply(space, asked, rules, mm, limits, self.all.without)
            except Unmodelled:
                found.append(feature)
                continue
            if (other.errno, list(space), mm.snapshot()) != mine:
                found.append(feature)
                with_it, without = self._fits(space), self._fits(self.state.space)
                if with_it != without and len(result.features_asked) == 1:
                    self.all.fit(feature, with_it)
        return found

    def _fits(self, space: AddressSpace) -> bool:
        """Whether the layout of ``space`` is what was read afterwards, identities aside."""
        walks = [walk for walk in self.seen.after if not walk.flags]
        return bool(walks) and all(
            [vma[:4] for vma in space.overlapping(walk.lo, walk.hi)] == [vma[:4] for vma in walk.vmas]
            for walk in walks
        )

    def _learn(self, asked: Learn) -> None:
        """A mapping of a driver not known yet: if it was made anew, it teaches what the driver sets."""
        seen = self.seen
        vma = seen.after_at(asked.operation.inputs["picked"])
        if vma is not None and vma.obj in seen.born and not self.before:
            self._saved = self.state.mm.snapshot()
            try:
                rules = self.all.rules
                self.result = apply(self.state.space, asked.operation, rules, self.state.mm, self.limits())
            except Unmodelled:
                self.result = None
            plain = self.state.space.at(vma.start)
            if self.result is not None and plain is not None:
                self.all.files.learn(vma, plain.flags)
        self.undecided(asked.reason)

    # ---- comparing ----

    def _compare(self, asked: Operation, result: Result) -> None:
        state, seen = self.state, self.seen
        problem, pages = self._result_differs(asked, result), False
        if problem and seen.call is not None and seen.call.result < 0:
            name = errno_name(seen.call.result)
            if name == "EINTR" and not seen.changed:
                self.undecided(_KILLED)
                return
            late = bool(state.space.journal) or asked.name in _CHECKED_LATE or seen.name == "process_madvise"
            if name in result.maybe_errnos:
                problem, pages = "", True
            elif (
                late
                and name in _UNCAPTURED.get(seen.name, _UNCAPTURED.get(asked.name, ()))
                and (not seen.changed or _is_of_unknown_file(asked))
            ):
                self.undecided(f"{name} of {asked.name}: its cause is not captured")
                return
        if seen.sections:
            problem = problem or self._state_differs(asked, result)
        elif not problem and second.expect(state.space.journal).anything:
            problem = "a change was predicted and no write section was seen"
        if problem and self._driver_differs(asked):
            self.undecided("the driver of this file sets now this, now that")
            return
        if problem:
            self.failed(problem)
            return
        if seen.sections and not sync.is_read(state, seen):
            self.undecided(_UNREAD)
            return
        compared = state.counters_known or not seen.sections
        if state.unknown or not compared:
            sync.learn_after(state, seen)
            sync.take_counters(state, seen)
        self._count_refusal(result)
        if not compared:
            self.finish(UNDECIDED, LOST if seen.lost else UNKNOWN_STATE)
        elif pages:
            self.finish(UNDECIDED, f"{asked.name}: the errno depends on pages, the layout is as predicted")
        else:
            self.finish(PASSED, "", result.rules)

    def _driver_differs(self, asked: Operation) -> bool:
        """Whether all that is wrong may be what was learnt of a driver: a new mapping with other flags."""
        vma = self.seen.after_at(asked.inputs.get("picked", 0)) if asked.name == "mmap" else None
        mine = self.state.space.at(vma.start) if vma is not None else None
        if vma is None or mine is None or vma.obj not in self.seen.born or mine[:2] != vma[:2]:
            return False
        if (mine.flags ^ vma.flags) & ~LEARNABLE or not mine.flags ^ vma.flags:
            return False
        return self.all.files.doubt(vma.file, access_of(vma.flags))

    def _state_differs(self, asked: Operation, result: Result) -> str:
        """Both evidences and the counters against the prediction."""
        state, seen = self.state, self.seen
        expected = second.expect(state.space.journal)
        unstored = asked.name == "brk" and any(type(effect) is New for effect in result.effects)
        problem, names = second.compare(
            expected,
            seen.events,
            result.effects,
            unstored,
            self.all.told,
            self.all.trace.deaths,
            not self.all.rules.has("munmap_new_outside"),
        )
        problem = problem or sync.after_differs(state, seen, names, seen.downgraded)
        return problem or sync.counters_differ(state, seen.sections[-1])

    def _result_differs(self, asked: Operation, result: Result) -> str:
        call = self.seen.call
        if call is None:
            return f"predicted {result.errno}" if result.errno is not None else ""
        if -4096 < call.result < 0:
            seen = errno_name(call.result)
            if result.errno == seen:
                return ""
            return f"the call failed with {seen}, expected {result.errno or hex(result.ret)}"
        if result.errno is not None:
            return f"the call returned {call.result:#x}, expected {result.errno}"
        expected = result.ret if asked.name in _RETURNS else 0
        if expected != call.result and self.seen.name != "process_madvise":
            return f"the call returned {call.result:#x}, expected {expected:#x}"
        return ""

    def _unchanged_differs(self) -> str:
        """Where nothing changed, what was read must be as it was, whatever the call meant."""
        problem = sync.after_differs(self.state, self.seen, {}, True)
        return problem or sync.counters_differ(self.state, self.seen.sections[-1])

    def _count_refusal(self, result: Result) -> None:
        merged = any(type(effect) is Merge for effect in result.effects)
        if not merged and not _MERGE_RULES.isdisjoint(result.rules):
            self.all.merges_refused += 1

    # ---- the model afterwards ----

    def _take_back(self) -> None:
        """The prediction is not what happened: the model goes back to what was before it."""
        if self.result is not None:
            self.state.space.take_back()
            self.state.mm.restore(self._saved)
            self.result = None

    def adopt(self) -> None:
        """The model becomes what was seen."""
        sync.adopt_after(self.state, self.seen)
        sync.take_counters(self.state, self.seen)

    def span(self) -> tuple[int, int]:
        """What the operation touched by either account, and a page on each side."""
        edges = [edge for old, new in self.state.space.journal for vma in (*old, *new) for edge in vma[:2]]
        if self.result is None:
            edges = []
        edges += [edge for event in self.seen.events for edge in event[2:] if edge]
        if self.before or not edges:
            edges += [edge for walk in self.seen.before for vma in walk.vmas[:8] for edge in vma[:2]]
        named = [address for address in self.seen.named if self.state.space.at(address) is not None]
        edges += [edge for address in named for edge in (address, address + self.all.page)]
        if not edges:
            return 0, 0
        return max(min(edges) - self.all.page, 0), max(edges) + self.all.page
