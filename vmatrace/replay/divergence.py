"""What a divergence looks like in words and on a page ruler, as commit messages of the kernel draw it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmatrace.rules.drawing import draw, legend
from vmatrace.simulator import RULES

if TYPE_CHECKING:
    from vmatrace.replay.result import Verdict


def text_lines(verdict: Verdict, page_size: int) -> Iterator[str]:
    """The call, what differs, the rules that decided with their commits, and the layouts drawn to scale."""
    yield verdict.call or verdict.syscall
    yield verdict.reason
    for id in verdict.rules:
        yield rule_line(id)
    yield from drawing(verdict, page_size)


def rule_line(id: str) -> str:
    """A rule: its id, the kernel function that it states, and the commit that made it."""
    rule = RULES.get(id)
    if rule is None:
        return f"rule {id}"
    commit = f", {rule.commit}" if rule.commit is not None else ""
    return f"rule {id} ({rule.kernel_function}){commit}"


def drawing(verdict: Verdict, page_size: int) -> Iterator[str]:
    """The layouts before, expected and observed on one ruler (page numbers), and what the letters mean."""
    if not any(vmas for _, vmas in verdict.layouts):
        return
    yield from draw(verdict.layouts, page_size.bit_length() - 1)
    yield from legend(verdict.layouts)
