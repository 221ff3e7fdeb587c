"""Memory policy of ranges: mbind and set_mempolicy_home_node; mbind_range changes one VMA."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from vmatrace.rules.constants import MPOL
from vmatrace.rules.context import Kernel
from vmatrace.rules.merge import note_change
from vmatrace.rules.model import Operation, Policy
from vmatrace.rules.modify import modify
from vmatrace.rules.registry import rule
from vmatrace.vma import Vma

# MPOL_MODE_FLAGS: flags that come with the mode.
_MODE_FLAGS: Final = 0xE000


@rule("mbind_no_holes", "queue_pages_test_walk")
def range_has_a_hole(kernel: Kernel, start: int, end: int, policy: Hashable) -> bool:
    """A range with a hole is refused before anything changes; the default policy accepts holes, but not a
    range of air."""
    covered, at = False, start
    for vma in kernel.space.overlapping(start, end):
        covered = True
        if vma.start > at and policy is not None:
            return True
        at = vma.end
    return not covered or (policy is not None and at < end)


@rule("equal_policy_skipped", "mbind_range")
def policy_is_the_same(kernel: Kernel, vma: Vma, policy: Hashable) -> bool:
    """A VMA that has an equal policy is left alone: no merge is tried."""
    return vma.policy == policy


def _bind(kernel: Kernel, vma: Vma, prev: Vma | None, start: int, end: int, policy: Hashable) -> Vma:
    """mbind_range for one VMA."""
    if policy_is_the_same(kernel, vma, policy):
        return vma
    changed, _ = modify(kernel, vma, prev, start, end, policy=policy)
    if changed.policy != policy:
        note_change(kernel, changed, "policy")
        changed = kernel.put(changed, changed._replace(policy=policy))
    return changed


def mbind(kernel: Kernel, operation: Operation) -> int:
    """mbind(start, len, mode, nmask, maxnode, flags); the policy is an input (None: the default)."""
    args = operation.args
    start, length = args["start"], args["len"]
    if "policy" not in operation.inputs:
        kernel.cannot_know("the new policy's content is not known")
    policy = operation.inputs["policy"]
    if args.get("mode", 0) & ~_MODE_FLAGS > max(MPOL.values()):
        kernel.fail("EINVAL")
    if not kernel.aligned(start) or args.get("flags", 0) & ~7:
        kernel.fail("EINVAL")
    end = start + kernel.align_up(length)
    if end >= 1 << 64:
        kernel.fail("EINVAL")
    if end == start:
        return 0
    if range_has_a_hole(kernel, start, end, policy):
        kernel.fail("EFAULT")
    prev = kernel.space.below(start)
    while start < end:
        vma = kernel.space.find(start)
        if vma is None or vma.start >= end:
            break
        if vma.start > start:
            start, prev = vma.start, kernel.space.below(vma.start)
        prev = _bind(kernel, vma, prev, start, min(vma.end, end), policy)
        start = prev.end
    return 0


@rule("home_node_modes", "set_mempolicy_home_node")
def policy_takes_no_home(kernel: Kernel, policy: Policy) -> bool:
    """Only MPOL_BIND and MPOL_PREFERRED_MANY take a home node; earlier VMAs stay changed."""
    return policy.mode not in (MPOL["MPOL_BIND"], MPOL["MPOL_PREFERRED_MANY"])


def set_mempolicy_home_node(kernel: Kernel, operation: Operation) -> int:
    """set_mempolicy_home_node(start, len, home_node, flags): VMAs without a policy are passed over."""
    args = operation.args
    start, home = args["start"], args["home_node"]
    if not kernel.aligned(start) or args.get("flags", 0) or not operation.inputs.get("node_online", True):
        kernel.fail("EINVAL")
    end = start + kernel.align_up(args["len"])
    if end >= 1 << 64:
        kernel.fail("EINVAL")
    if end == start:
        return 0
    found = False
    prev = kernel.space.below(start)
    while start < end:
        vma = kernel.space.find(start)
        if vma is None or vma.start >= end:
            break
        if vma.start > start:
            start, prev = vma.start, kernel.space.below(vma.start)
        if vma.policy is not None:
            found = True
            if not isinstance(vma.policy, Policy):
                kernel.cannot_know("the policy's content is not known")
            if policy_takes_no_home(kernel, vma.policy):
                kernel.fail("EOPNOTSUPP")
            prev = _bind(kernel, vma, prev, start, min(vma.end, end), vma.policy._replace(home_node=home))
        else:
            prev = vma
        start = prev.end
    if not found:
        kernel.fail("ENOENT")
    return 0


CALLS = {"mbind": mbind, "set_mempolicy_home_node": set_mempolicy_home_node}
