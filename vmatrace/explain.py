"""Why two neighbours are not one VMA, and which single change would merge them: the rules, asked one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmatrace.kernel import RuleSet
from vmatrace.rules import mergeable
from vmatrace.rules.context import Kernel
from vmatrace.rules.model import Limits, MmState
from vmatrace.rules.proposal import Proposal, proposal_like
from vmatrace.rules.registry import RULES
from vmatrace.vma import ACCESS, ACCOUNT, FLAG_BITS, LOCKED_MASK, SPECIAL, AddressSpace, Vma, flag_names

_DEFAULT_LIMITS: Final = Limits()
# Flags that a call of the program itself can make equal, and that call.
_REMEDIES: Final = (
    (ACCESS, "mprotect both to the same protection"),
    (LOCKED_MASK, "mlock or munlock both"),
    (FLAG_BITS["RAND_READ"] | FLAG_BITS["SEQ_READ"], "madvise(MADV_NORMAL) on both"),
    (FLAG_BITS["DONTCOPY"], "madvise(MADV_DOFORK) on both"),
    (FLAG_BITS["DONTDUMP"], "madvise(MADV_DODUMP) on both"),
    (FLAG_BITS["WIPEONFORK"], "madvise(MADV_KEEPONFORK) on both"),
    (FLAG_BITS["HUGEPAGE"] | FLAG_BITS["NOHUGEPAGE"], "the same madvise about huge pages on both"),
    (FLAG_BITS["MERGEABLE"], "the same madvise about KSM on both"),
    (ACCOUNT, "map both with MAP_NORESERVE, or make both writable before either is"),
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason why two neighbours stay apart: the rule that says so, in words, and what would take it away.

    ``remedy`` is empty where nothing that a program does can.
    """

    rule: str
    text: str
    remedy: str = ""

    @property
    def commit(self) -> str:
        """The commit of the rule, or nothing."""
        rule = RULES.get(self.rule)
        return str(rule.commit) if rule is not None and rule.commit is not None else ""


def obstacles(lower: Vma, upper: Vma, rules: RuleSet, limits: Limits = _DEFAULT_LIMITS) -> list[Obstacle]:
    """Every reason why the kernel would not make ``lower`` and ``upper`` one VMA; empty: nothing is in the way.

    Nothing in the way does not mean that they ever merge: the kernel tries only when one of them changes.
    """
    if lower.end != upper.start:
        gap = (upper.start - lower.end) >> limits.shift
        return [Obstacle("", f"{gap} pages lie between them", "map the gap with the attributes of both")]
    kernel = Kernel(AddressSpace((lower, upper)), MmState(), rules, limits)
    proposal = proposal_like(upper, upper.start, upper.end, limits.shift, lower)
    proposal.middle = upper
    found = refusals(kernel, proposal, lower)
    if upper.close and all(obstacle.rule != "close_refuses" for obstacle in found):
        found.append(Obstacle("close_keeps_middle", "the upper one has a close hook and must not be deleted"))
    return found


def refusals(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> list[Obstacle]:
    """Every condition by which the kernel refuses to let a range join a VMA that touches it.

    The kernel stops at the first; the program that wants the two to be one has to meet them all.
    """
    special = []
    if mergeable.range_is_special(kernel, proposal):
        special.append(Obstacle("special_never_merges", "special mappings never merge"))
    return [
        *special,
        *_attributes(kernel, proposal, neighbour),
        *_offsets(kernel, proposal, neighbour),
        *_anon_vmas(kernel, proposal, neighbour),
    ]


def single_change(found: list[Obstacle]) -> str:
    """The one change that would let two neighbours merge, or nothing where it takes more or none can."""
    return found[0].remedy if len(found) == 1 else ""


def _attributes(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> list[Obstacle]:
    found = []
    if mergeable.policies_differ(kernel, proposal, neighbour):
        found.append(Obstacle("policy_equal", "their memory policies differ", "mbind both alike"))
    difference = mergeable.flags_differ(kernel, proposal, neighbour) or 0
    if difference:
        text = "their flags differ: " + ", ".join(flag_names(difference))
        found.append(Obstacle("flags_equal", text, _remedy_of(difference)))
    if mergeable.files_differ(kernel, proposal, neighbour):
        both = bool(neighbour.file) and bool(proposal.file)
        text = "they map different open files" if both else "only one of them maps a file"
        found.append(Obstacle("file_equal", text, "map both through the same file descriptor" if both else ""))
    if mergeable.userfaultfd_contexts_differ(kernel, proposal, neighbour):
        found.append(Obstacle("uffd_equal", "they belong to different userfaultfds", "unregister both"))
    if mergeable.anonymous_names_differ(kernel, proposal, neighbour):
        found.append(Obstacle("anon_name_equal", "their names differ", "name both alike"))
    side = "lower" if neighbour.start < proposal.start else "upper"
    if mergeable.neighbour_has_close(kernel, proposal, neighbour):
        found.append(Obstacle("close_refuses", f"the {side} one has a close hook"))
    if side == "upper" and mergeable.next_with_close_refuses(kernel, proposal, neighbour):
        found.append(Obstacle("close_next_refuses", "the upper one has a close hook and might be deleted"))
    return found


def _offsets(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> list[Obstacle]:
    mine, its = (proposal.pgoff, proposal.anon_pgoff), (neighbour.pgoff, neighbour.anon_pgoff)
    if neighbour.start < proposal.start:
        lower, upper, pages = its, mine, (neighbour.end - neighbour.start) >> kernel.shift
    else:
        lower, upper, pages = mine, its, (proposal.end - proposal.start) >> kernel.shift
    if mergeable.offsets_break(kernel, lower[0], pages, upper[0]):
        wanted = lower[0] + pages
        text = f"page offsets do not continue: {upper[0]:#x} where {wanted:#x} would fit"
        if proposal.file is None and neighbour.anonymous and not (proposal.flags | neighbour.flags) & SPECIAL:
            return [Obstacle("offset_linear", text + " (one was moved after it was touched)")]
        return [Obstacle("offset_linear", text, f"map the upper one from offset {wanted:#x} pages")]
    if mergeable.anon_offsets_break(kernel, proposal, lower[1], pages, upper[1]):
        return [Obstacle("anon_offset_linear", "the page offsets of their anonymous pages do not continue")]
    return []


def _remedy_of(difference: int) -> str:
    """The one call that makes all these flags equal, or nothing."""
    for flags, remedy in _REMEDIES:
        if not difference & ~flags:
            return remedy
    return ""


_ANON_VMA_RULES: Final = {
    "unfaulted_target_refuses": "one was touched and the other was not",
    "fork_child_target_refuses": "one was touched before a fork, the other never",
    "fork_child_source_refuses": "one was touched before a fork, the other never",
    "two_anon_vmas_refuse": "each was touched on its own, before they became neighbours",
}


def _anon_vmas(kernel: Kernel, proposal: Proposal, neighbour: Vma) -> list[Obstacle]:
    kernel.decided.clear()
    if not mergeable.anon_vma_refuses(kernel, proposal, neighbour):
        return []
    rule = next(reversed(kernel.decided), "")
    return [Obstacle(rule, _ANON_VMA_RULES.get(rule, "their anon_vmas do not fit"))]
