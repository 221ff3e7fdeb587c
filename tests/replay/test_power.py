"""Each rule, switched off, changes the verdict of a committed scenario or trace; what none catches is listed."""

from __future__ import annotations

import pytest

from tests.conformance.power import Catch, power
from vmatrace.simulator import RULES

# Rules that nothing committed catches. No kernel of their time is in the archives that the lab takes kernels from;
# each has a unit test whose outcome was read from the source.
_BETWEEN = "a kernel from v6.5 to v6.11"
NOT_CAUGHT = {
    "close_next_refuses": f"needs {_BETWEEN} with SysV segments side by side",
    "old_case7_close": f"needs {_BETWEEN} with SysV segments side by side",
    "seal_checked_first": "needs a kernel of v6.10 or v6.11",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Catch]:
    return power()[0]


def test_every_other_observable_rule_is_caught(found: dict[str, Catch]) -> None:
    observable = {rule.id for rule in RULES.values() if not rule.unobservable}
    assert observable - set(found) - set(NOT_CAUGHT) == set()


def test_the_list_names_rules_that_nothing_catches(found: dict[str, Catch]) -> None:
    assert set(NOT_CAUGHT) <= set(RULES)
    assert set(NOT_CAUGHT) & set(found) == set()


def test_a_trace_catches_what_no_layout_shows(found: dict[str, Catch]) -> None:
    # Which of two pieces is the new object: no scenario can tell, a trace does.
    assert found["munmap_new_outside"].file.endswith(".vmat")
