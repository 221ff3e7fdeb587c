"""What the rules say of one decision: the merge, cut, copy or growth recomputed from what the kernel looked at.

There is no second model here: a tiny address space is made of the VMAs in the record, and the simulator's rules run
on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from vmatrace.explain import refusals
from vmatrace.ingest.decisions import Decision
from vmatrace.kernel import RuleSet
from vmatrace.replay.requests import policy_of
from vmatrace.rules.context import Kernel
from vmatrace.rules.copy import copy_vma
from vmatrace.rules.merge import merge_existing_range, merge_new_range
from vmatrace.rules.model import KernelError, Limits, MmState, Unmodelled
from vmatrace.rules.proposal import Proposal
from vmatrace.rules.registry import RULES
from vmatrace.rules.split import cut_in_two
from vmatrace.rules.steps import expand_vma, extend_in_place, shrink_vma
from vmatrace.schema import PROPOSAL_BITS
from vmatrace.vma import AddressSpace, Vma

_JUST_EXPAND: Final = PROPOSAL_BITS["PROPOSAL_JUST_EXPAND"]
_GIVE_UP: Final = PROPOSAL_BITS["PROPOSAL_GIVE_UP_ON_OOM"]
_KEEP_SOURCE: Final = PROPOSAL_BITS["PROPOSAL_KEEP_SOURCE"]
_NEW_BELOW: Final = PROPOSAL_BITS["PROPOSAL_NEW_BELOW"]
# The merge step before v6.12, and since then where the compiler left it a function of its own.
_MERGE_ALONE: Final = frozenset(("vma_merge", "vma_merge_existing_range"))


@dataclass(frozen=True, slots=True)
class Case:
    """A decision with the VMAs that it looked at, by role, and the rules that it is held to."""

    decision: Decision
    vmas: Mapping[str, Vma]
    limits: Limits
    rules: RuleSet
    off: Collection[str] = ()

    def kernel(self) -> Kernel:
        """The VMAs of the record as an address space, ready for a rule."""
        distinct = {vma.obj: vma for role, vma in self.vmas.items() if role != "result"}
        try:
            space = AddressSpace(distinct.values())
        except ValueError as error:
            raise Unmodelled(f"the VMAs of the record do not fit together: {error}") from None
        return Kernel(space, MmState(), self.rules, self.limits, self.off)

    def under(self, feature: str, value: bool) -> Case:
        """The same where a feature has that value."""
        return replace(self, rules=self.rules.changed(**{feature: value}))

    def need(self, *roles: str) -> Vma:
        """The VMA of the first of these roles that the record has."""
        for role in roles:
            if role in self.vmas:
                return self.vmas[role]
        raise Unmodelled(f"the {roles[0]} VMA is not in the record")


class Prediction(NamedTuple):
    """What must come of a decision: the object returned (0: none), the VMA that it is then, an errno.

    ``after`` is None where nothing is returned that could be compared, ``result`` where it has no meaning.
    """

    merged: bool
    result: object
    after: Vma | None
    errno: str | None
    rules: tuple[str, ...]
    asked: tuple[str, ...]


class Refusal(NamedTuple):
    """One condition that refused a merge attempt: on which side (left, right, or both: ""), and its rule."""

    side: str
    rule: str
    text: str
    commit: str
    remedy: str


class Outcome(NamedTuple):
    """What comes of judging one decision; ``expected`` and ``observed`` are texts, for a FAILED one."""

    verdict: str
    reason: str
    rules: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    expected: str = ""
    observed: str = ""


def proposal_of(case: Case) -> Proposal:
    """The range and attributes that the kernel was asked to merge."""
    asked = case.decision
    proposal = Proposal(asked.start, asked.end, asked.pgoff, asked.flags, case.vmas.get("prev"), case.vmas.get("next"))
    proposal.file = asked.file or None
    proposal.anon_vma = asked.anon_vma or None
    proposal.policy = policy_of(asked.policy)
    proposal.uffd = asked.uffd or None
    proposal.name = asked.name or None
    proposal.copied_from = case.vmas.get("copied_from")
    proposal.expand_only = bool(asked.bits & _JUST_EXPAND)
    proposal.give_up_on_oom = bool(asked.bits & _GIVE_UP)
    if case.rules.has("anon_pgoff"):
        proposal.anon_pgoff = asked.anon_pgoff
    return proposal


def _predicted(
    kernel: Kernel, merged: bool, result: object, after: Vma | None = None, errno: str | None = None
) -> Prediction:
    return Prediction(merged, result, after, errno, tuple(kernel.decided), tuple(kernel.asked))


def _merge_new(case: Case) -> Prediction:
    """vma_merge_new_range, before v6.12 vma_merge for a range that no VMA holds yet."""
    kernel = case.kernel()
    merged = merge_new_range(kernel, proposal_of(case), "copy")
    return _predicted(kernel, merged is not None, merged.obj if merged else 0, merged)


def _merge_existing(case: Case) -> Prediction:
    """vma_modify: the merge step, then the cuts where it was refused; or the merge step alone."""
    kernel, asked = case.kernel(), case.decision
    middle = case.need("middle")
    proposal = proposal_of(case)
    proposal.middle = middle
    merged = merge_existing_range(kernel, proposal)
    if merged is not None:
        return _predicted(kernel, True, merged.obj, merged)
    if asked.function in _MERGE_ALONE:
        return _predicted(kernel, False, 0)
    try:
        if middle.start < asked.start:
            _, middle = cut_in_two(kernel, middle, asked.start, True)
        if middle.end > asked.end:
            middle, _ = cut_in_two(kernel, middle, asked.end, False)
    except KernelError as error:
        return _predicted(kernel, False, 0, None, error.errno)
    return _predicted(kernel, False, middle.obj, middle)


def _extend(case: Case) -> Prediction:
    """vma_merge_extend."""
    kernel = case.kernel()
    merged = extend_in_place(kernel, case.need("source", "middle", "prev"), case.decision.delta)
    return _predicted(kernel, merged is not None, merged.obj if merged else 0, merged)


def _copied(case: Case) -> Prediction:
    """copy_vma; its neighbours are those of the merge attempt inside it."""
    asked, kernel = case.decision, case.kernel()
    source = case.need("source", "copied_from", "middle")
    keep = bool(asked.bits & _KEEP_SOURCE)
    try:
        copy, _ = copy_vma(kernel, source, asked.start, asked.end - asked.start, asked.pgoff, keep)
    except KernelError as error:
        return _predicted(kernel, False, 0, None, error.errno)
    merged = bool(kernel.effects) and type(kernel.effects[-1]).__name__ == "Merge"
    return _predicted(kernel, merged, copy.obj if merged else None, copy)


def _expand(case: Case) -> Prediction:
    """vma_expand outside a merge attempt: exec's stack, and before v6.12 the merge of a mmap."""
    kernel, asked = case.kernel(), case.decision
    target = case.need("source", "middle")
    grown = expand_vma(kernel, target, asked.start, asked.end, asked.pgoff)
    return _predicted(kernel, False, None, grown)


def _shrink(case: Case) -> Prediction:
    """vma_shrink."""
    kernel, asked = case.kernel(), case.decision
    shrunk = shrink_vma(kernel, case.need("source", "middle"), asked.start, asked.end, asked.pgoff)
    return _predicted(kernel, False, None, shrunk)


def _split(case: Case) -> Prediction:
    """__split_vma: what is left of the VMA that was cut."""
    kernel, asked = case.kernel(), case.decision
    vma = case.need("source", "middle")
    if not vma.start < asked.start < vma.end:
        raise Unmodelled("the address of the cut does not lie inside the VMA")
    below = bool(asked.bits & _NEW_BELOW)
    try:
        lower, upper = cut_in_two(kernel, vma, asked.start, below)
    except KernelError as error:
        return _predicted(kernel, False, None, None, error.errno)
    return _predicted(kernel, False, None, upper if below else lower)


PREDICTIONS: Final[Mapping[str, Callable[[Case], Prediction]]] = {
    "MERGE_NEW": _merge_new,
    "MERGE_EXISTING": _merge_existing,
    "MERGE_EXTEND": _extend,
    "MERGE_COPIED": _copied,
    "EXPAND": _expand,
    "SHRINK": _shrink,
    "SPLIT": _split,
}
"""How each kind of decision is recomputed."""

# Rules that refuse a merge for another reason than one neighbour.
_WHOLE: Final = frozenset(
    (
        "interior_never_merges", "two_neighbour_anon_vmas", "close_keeps_middle", "close_keeps_next",
        "brk_looks_left", "old_case7_close", "dontunmap_no_self_merge",
    )
)  # fmt: skip


def refusals_of(case: Case, predicted: Prediction) -> tuple[Refusal, ...]:
    """Every condition that refused a merge attempt, side by side; the kernel itself stops at the first."""
    kernel, proposal = case.kernel(), proposal_of(case)
    middle = proposal.middle = case.vmas.get("middle")
    left, right = proposal.prev, proposal.next
    if middle is not None and proposal.start != middle.start:
        left = None
    if middle is not None and proposal.end != middle.end:
        right = None
    found = []
    for side, neighbour in (("left", left), ("right", right)):
        edge = None if neighbour is None else neighbour.end if side == "left" else neighbour.start
        if neighbour is not None and edge == (proposal.start if side == "left" else proposal.end):
            for each in refusals(kernel, proposal, neighbour):
                found.append(Refusal(side, each.rule, each.text, each.commit, each.remedy))
    found += [_whole(id) for id in predicted.rules if id in _WHOLE]
    if not found:
        found.append(Refusal("", "", "no VMA touches the range", "", ""))
    return tuple(found)


def _whole(id: str) -> Refusal:
    rule = RULES[id]
    return Refusal("", id, rule.sentence, str(rule.commit) if rule.commit is not None else "", "")
