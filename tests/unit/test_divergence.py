"""A divergence in words and on a ruler: the call, what differs, the rule with its commit, the layouts."""

from __future__ import annotations

from vmatrace.replay import FAILED, Verdict
from vmatrace.replay.divergence import rule_line, text_lines
from vmatrace.vma import MAYREAD, MAYWRITE, READ, WRITE, Vma

RW = READ | WRITE | MAYREAD | MAYWRITE
RO = READ | MAYREAD | MAYWRITE


def layout(*parts: tuple[int, int, int]) -> tuple[Vma, ...]:
    return tuple(Vma(start << 12, end << 12, flags, start) for start, end, flags in parts)


WHOLE = layout((16, 20, RW))
CUT = layout((16, 18, RO), (18, 20, RW))
VERDICT = Verdict(
    space=1, pid=7, op=3, syscall="mprotect", verdict=FAILED, reason="[0x10000, 0x12000): expected nothing",
    rules=("anon_vma_cloned",), call="mprotect(start=0x10000, len=0x2000, prot=1) = 0",
    layouts=(("before", WHOLE), ("expected", WHOLE), ("observed", CUT)),
)  # fmt: skip


def test_the_layouts_stand_on_one_ruler_with_equal_letters_for_equal_attributes() -> None:
    lines = list(text_lines(VERDICT, 4096))
    assert lines[:2] == [VERDICT.call, VERDICT.reason]
    assert lines[3:] == [
        "before    |aaaaaaa|",
        "expected  |aaaaaaa|",
        "observed  |bbb|aaa|",
        "          10  12  14",
        "a  READ|WRITE|MAYREAD|MAYWRITE",
        "b  READ|MAYREAD|MAYWRITE",
    ]


def test_a_rule_is_named_with_the_kernel_function_and_its_commit() -> None:
    line = rule_line("hook_before_merge")
    assert line.startswith("rule hook_before_merge (")
    assert "c84bf6dd2b83" in line


def test_a_rule_that_is_gone_is_named_all_the_same() -> None:
    assert rule_line("rule_of_another_time") == "rule rule_of_another_time"


def test_json_holds_the_whole_text() -> None:
    found = VERDICT.divergence({"anon_vma_cloned": "a commit"}, 4096)
    assert found["text"].splitlines() == list(text_lines(VERDICT, 4096))
    assert found["commit"] == "a commit"
    assert found["expected"] == VERDICT.expected


def test_without_layouts_there_is_no_ruler() -> None:
    bare = Verdict(space=1, pid=7, op=3, syscall="fork", verdict=FAILED, reason="why")
    assert list(text_lines(bare, 4096)) == ["fork", "why"]
