"""What the commands share that take ``--rules`` and ``--without``."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from vmatrace.cli import common
from vmatrace.kernel import FEATURES, RuleSet, rule_set

WithoutOption = Annotated[list[str] | None, typer.Option("--without", help="Switch a rule off (may be repeated).")]


def chosen_rules(text: str) -> RuleSet:
    """The rule set that ``--rules`` names where there is no trace: ``auto`` is that of the running kernel.

    Raises UsageError, with the nearest names, for a name or a feature that is none.
    """
    head = re.split(r"[+-]", text, maxsplit=1)[0]
    chosen = rule_set(text, _of_this_kernel() if head == "auto" else None)
    doubtful = [feature for feature in chosen.unknown if FEATURES[feature].observable]
    if doubtful:
        common.print_warning(f"not known of this kernel, taken as absent: {', '.join(doubtful)}")
    return chosen


def _of_this_kernel() -> RuleSet:
    from vmatrace import btf
    from vmatrace.errors import VmatraceError
    from vmatrace.fingerprint import live_profile

    try:
        described = btf.load()
    except VmatraceError as error:
        described = None
        common.print_warning(f"{error.message}; behaviour alone decides")
    return live_profile(described).rule_set()
