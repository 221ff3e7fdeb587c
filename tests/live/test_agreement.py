"""Random operations on this kernel agree with the rules: the short form of `make agree`."""

from __future__ import annotations

import pytest

from tests.conformance.agree import agree, report
from tests.conformance.tally import Tally
from tests.conformance.unreachable import RULES as UNREACHABLE
from vmatrace.fingerprint import live_profile
from vmatrace.simulator import RULES

OPERATIONS = 20_000
# Calls that every run of this size judges, with outcomes among them.
EXPECTED = {
    ("mmap", "new"), ("mmap", "merge left"), ("mmap", "EEXIST"), ("munmap", "unmap"), ("munmap", "split"),
    ("mprotect", "split"), ("mprotect", "merge left"), ("mprotect", "ENOMEM"), ("mremap", "copy"),
    ("madvise", "split"), ("mlock", "split"), ("brk", "grow"), ("fork", "copy"),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Tally:
    return agree(OPERATIONS, 1, tmp_path_factory.mktemp("agree"), longest=5_000)


def test_no_operation_diverges(found: Tally) -> None:
    assert found.failures == []
    assert found.lost_records == 0
    assert found.operations >= OPERATIONS


def test_hardly_anything_is_undecided(found: Tally) -> None:
    assert found.undecided_share < 0.02, found.undecided.most_common()


def test_the_usual_outcomes_are_among_them(found: Tally) -> None:
    assert not EXPECTED - set(found.outcomes), "\n".join(report(found, live_profile().rule_set()))


def test_what_is_called_unreachable_is_a_rule_and_did_not_decide(found: Tally) -> None:
    assert set(UNREACHABLE) <= set(RULES)
    assert not set(UNREACHABLE) & set(found.rules)
