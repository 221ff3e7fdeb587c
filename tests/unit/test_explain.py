"""Two neighbours stay apart for reasons that `explain` names, and merge where it names none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmatrace.explain import Obstacle, obstacles, single_change
from vmatrace.kernel import NAMED
from vmatrace.rules.model import Operation
from vmatrace.simulator import RULES, apply
from vmatrace.vma import ACCOUNT, LOCKED, MAY_ALL, READ, WRITE, AddressSpace, Vma

RULESET = NAMED["6.18"]
PAGE = 4096
PLAIN = READ | WRITE | MAY_ALL | ACCOUNT


def _vma(first: int, pages: int, **fields: object) -> Vma:
    start = (256 + first) * PAGE
    vma = Vma(start, start + pages * PAGE, PLAIN, start // PAGE, obj=first)
    return vma._replace(**fields)  # type: ignore[arg-type]


def _rules(found: list[Obstacle]) -> list[str]:
    return [one.rule for one in found]


LOWER = _vma(0, 2)


@pytest.mark.parametrize(
    ("upper", "rules", "change"),
    [
        (_vma(2, 1), [], ""),
        (_vma(2, 1, flags=PLAIN & ~WRITE), ["flags_equal"], "mprotect both to the same protection"),
        (_vma(2, 1, flags=PLAIN | LOCKED), ["flags_equal"], "mlock or munlock both"),
        (_vma(2, 1, flags=(PLAIN | LOCKED) & ~WRITE), ["flags_equal"], ""),
        (_vma(2, 1, file=7, anonymous=False), ["file_equal"], ""),
        (_vma(2, 1, pgoff=9), ["offset_linear"], ""),
        (_vma(2, 1, policy="p"), ["policy_equal"], "mbind both alike"),
        (_vma(2, 1, uffd=1, pgoff=9), ["uffd_equal", "offset_linear"], ""),
        (_vma(2, 1, anon_vma=1, forked=True), ["fork_child_source_refuses"], ""),
        (_vma(3, 1), [""], "map the gap with the attributes of both"),
    ],
)
def test_each_reason_is_named(upper: Vma, rules: list[str], change: str) -> None:
    found = obstacles(LOWER, upper, RULESET)
    assert _rules(found) == rules
    assert single_change(found) == change
    assert all(rule in RULES for rule in rules if rule)


def test_two_touched_apart() -> None:
    found = obstacles(_vma(0, 2, anon_vma=1), _vma(2, 1, anon_vma=2), RULESET)
    assert _rules(found) == ["two_anon_vmas_refuse"]
    assert "on its own" in found[0].text


def test_older_kernels_have_other_reasons() -> None:
    faulted = _vma(2, 1, anon_vma=1)
    assert _rules(obstacles(LOWER, faulted, NAMED["6.12"])) == ["unfaulted_target_refuses"]
    assert obstacles(LOWER, faulted, RULESET) == []
    closing = LOWER._replace(file=1, anonymous=False, close=True)
    assert "close_refuses" in _rules(obstacles(closing, _vma(2, 1), NAMED["6.1"]))


fields = st.fixed_dictionaries(
    {
        "anon_vma": st.sampled_from((None, 1, 2)),
        "pgoff": st.sampled_from((256, 258, 300)),
        "policy": st.sampled_from((None, "p")),
        "file": st.sampled_from((None, 1)),
    }
)


@given(fields, fields, st.sampled_from(sorted(NAMED)))
def test_no_obstacle_means_that_a_change_merges_them(
    low: dict[str, object], high: dict[str, object], name: str
) -> None:
    """The upper one, changed to what it is to be, joins the lower one where nothing is in the way; else not."""
    lower, upper = _vma(0, 2, **low), _vma(2, 1, **high)
    expected = not obstacles(lower, upper, NAMED[name])
    space = AddressSpace((lower, upper._replace(flags=PLAIN | LOCKED)))
    change = {"start": upper.start, "end": upper.end, "flags": PLAIN}
    apply(space, Operation("modify", change), NAMED[name])
    assert (len(space) == 1) is expected
