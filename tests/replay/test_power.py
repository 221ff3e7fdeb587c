"""Each rule, switched off, changes the verdict of a committed scenario or trace; what none catches is listed."""

from __future__ import annotations

import pytest

from tests.conformance.power import Catch, power
from vmatrace.simulator import RULES

# Rules that nothing committed can catch yet, and why. Each of them has a unit test with a derived outcome.
NOT_CAUGHT = {
    "close_refuses": "before v6.5; needs a trace of the time with SysV segments side by side",
    "close_next_refuses": "before v6.5; needs a trace of the time with SysV segments side by side",
    "old_case7_close": "before v6.5; needs a trace of the time with SysV segments side by side",
    "old_extend_with_close": "before v6.5; needs a trace of the time with SysV segments side by side",
    "old_mmap_next_first": "before v6.5; which VMA survives, where both answers look alike",
    "overlay_unmapped_first": "before v6.12; a hook that fails under MAP_FIXED",
    "seal_checked_first": "v6.10 and v6.11 only",
    "anon_offset_linear": "v7.3",
    "anon_name_equal": "CONFIG_ANON_VMA_NAME is off in the kernels at hand",
    "name_anonymous_only": "CONFIG_ANON_VMA_NAME is off in the kernels at hand",
    "name_writes_old_flags": "CONFIG_ANON_VMA_NAME is off in the kernels at hand",
    "execute_only_pkey": "needs a CPU with protection keys",
    "pkey_kept": "needs a CPU with protection keys",
    "overcommit": "whether a charge is refused is an input",
    "one_hook": "no driver is that faulty",
    "compat_layer": "the nested hooks that exist change no flag and no close hook",
    "compat_only_adds_flags": "the nested hooks that exist change no flag and no close hook",
    "compat_overwrites_ops": "the nested hooks that exist change no flag and no close hook",
    "uffd_release_quiet": "needs an allocation to fail inside the kernel",
    "exec_stack_setup": "exec builds the stack before anything can watch it",
    "exec_stack_moves": "exec builds the stack before anything can watch it",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Catch]:
    return power()[0]


def test_every_other_observable_rule_is_caught(found: dict[str, Catch]) -> None:
    observable = {rule.id for rule in RULES.values() if not rule.unobservable}
    assert observable - set(found) - set(NOT_CAUGHT) == set()


def test_the_list_names_rules_that_exist() -> None:
    assert set(NOT_CAUGHT) <= set(RULES)


def test_a_trace_catches_what_no_layout_shows(found: dict[str, Catch]) -> None:
    # Which of two pieces is the new object: no scenario can tell, a trace does.
    assert found["munmap_new_outside"].file.endswith(".vmat")
