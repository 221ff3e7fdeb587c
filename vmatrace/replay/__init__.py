"""Replays a trace through the rules: a verdict for each operation - did the kernel do what they say?"""

from __future__ import annotations

import os
from collections.abc import Collection

from vmatrace.ingest.trace import Trace
from vmatrace.kernel import RuleSet
from vmatrace.replay import engine
from vmatrace.replay.refusals import Refusals
from vmatrace.replay.requests import SKIPPED_KINDS
from vmatrace.replay.result import FAILED, INPUT, PASSED, SKIPPED, UNDECIDED, ReplayResult, Verdict


def run(
    trace: Trace | str | os.PathLike[str], rules: str | RuleSet = "auto", without: Collection[str] = ()
) -> ReplayResult:
    """Replay a trace, given as a path or opened. ``without`` names rules to switch off.

    Raises BadTrace where the file is none, UsageError for an unknown rule set or rule.
    """
    return engine.run(trace if isinstance(trace, Trace) else Trace(trace), rules, without)


__all__ = [
    "FAILED", "INPUT", "PASSED", "SKIPPED", "SKIPPED_KINDS", "UNDECIDED", "Refusals", "ReplayResult",
    "Verdict", "run",
]  # fmt: skip
