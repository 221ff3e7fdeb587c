"""The reproducer: what it writes for a divergence, and that it compiles without a warning."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmatrace.ingest import Trace
from vmatrace.replay import FAILED, PASSED, Verdict, run
from vmatrace.replay.rebuild import Layout, rebuild
from vmatrace.replay.reproducer import can_repeat, first_reproducer, reproducer
from vmatrace.vma import ACCOUNT, DONTDUMP, MAYREAD, MAYWRITE, READ, SEALED, WRITE, Vma

DEMO = Path(__file__).parents[1] / "data" / "demo.vmat"
RW = READ | WRITE | MAYREAD | MAYWRITE | ACCOUNT
LOW = 0x7F0000000000


def vma(first: int, last: int, flags: int = RW, **more: object) -> Vma:
    start = LOW + first * 4096
    more.setdefault("pgoff", start >> 12)
    return Vma(start=start, end=LOW + last * 4096, flags=flags, **more)  # type: ignore[arg-type]


def statements(*vmas: Vma, files: dict[object, str] | None = None) -> list[str]:
    return list(rebuild(Layout(vmas, LOW, 4096, files or {})))


@pytest.fixture(scope="module")
def diverging() -> tuple[Trace, list[Verdict]]:
    trace = Trace(DEMO)
    return trace, [v for v in run(trace, without=("flags_equal",)).failed if can_repeat(v)]


def test_each_program_compiles_without_a_warning(
    diverging: tuple[Trace, list[Verdict]], tmp_path: Path
) -> None:
    trace, verdicts = diverging
    assert verdicts
    for number, verdict in enumerate(verdicts[:5]):
        source = tmp_path / f"{number}.c"
        source.write_text(reproducer(trace, verdict), encoding="utf-8")
        words = ["gcc", "-Wall", "-Wextra", "-Werror", "-c", "-o", source.with_suffix(".o"), source]
        subprocess.run(words, check=True)


def test_the_head_tells_the_call_the_rule_and_shows_the_layouts(
    diverging: tuple[Trace, list[Verdict]],
) -> None:
    trace, verdicts = diverging
    text = reproducer(trace, verdicts[0])
    head = text[: text.index("*/")]
    assert verdicts[0].call in head
    assert verdicts[0].rules[-1] in head
    assert " before  " in head
    assert "0x7f" not in text[text.index("static void rebuild") :]  # offsets only: the area is its own


def test_a_good_trace_gives_no_program() -> None:
    trace = Trace(DEMO)
    assert first_reproducer(trace, run(trace)) == ""


@pytest.mark.parametrize("syscall", ["fork", "exit", "section"])
def test_what_no_mapping_can_repeat_is_not_tried(syscall: str) -> None:
    layouts = (("before", (vma(0, 1),)),)
    assert not can_repeat(Verdict(1, 1, 0, syscall, FAILED, layouts=layouts))
    assert not can_repeat(Verdict(1, 1, 0, "mmap", PASSED))


def test_an_unfaulted_vma_is_one_map() -> None:
    assert statements(vma(1, 3, READ | MAYREAD | MAYWRITE)) == [
        "map(0x1000, 0x2000, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0x0);"
    ]


def test_pieces_with_one_anon_vma_are_faulted_as_one() -> None:
    lines = statements(vma(0, 2, anon_vma=5), vma(4, 6, anon_vma=5))
    assert lines[:3] == [
        "map(0x0, 0x6000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0x0);",
        "touch(0x0);",
        "munmap(area + 0x2000, 0x2000);",
    ]


def test_neighbours_with_two_anon_vmas_are_set_apart_while_faulted() -> None:
    lines = statements(vma(0, 2, anon_vma=5), vma(2, 4, anon_vma=6))
    touched = lines.index("touch(0x2000);")
    assert "MADV_DONTDUMP" in lines[touched - 1]
    assert "MADV_DODUMP" in lines[touched + 1]


def test_a_forked_vma_is_faulted_before_the_fork_and_others_after() -> None:
    lines = statements(vma(0, 2, anon_vma=5, forked=True), vma(3, 4, anon_vma=6))
    fork = lines.index("go_on_in_a_child();")
    assert lines.index("touch(0x0);") < fork < lines.index("touch(0x3000);")


def test_a_vma_that_was_moved_is_faulted_elsewhere_and_moved() -> None:
    lines = statements(vma(0, 2, anon_vma=5, pgoff=(LOW >> 12) + 16))
    assert lines[0] == "map_moved(0x0, 0x2000, MAP_PRIVATE | MAP_ANONYMOUS, 0x10000);"


def test_attributes_follow_and_seals_come_last() -> None:
    lines = statements(vma(0, 1, RW | DONTDUMP | SEALED), vma(1, 2, RW | DONTDUMP))
    assert [("MADV_DONTDUMP" in line, "mseal" in line) for line in lines[2:]] == [
        (False, False), (True, False), (False, False), (True, False), (False, True),
    ]  # fmt: skip


def test_a_file_is_the_same_one_for_each_of_its_pieces() -> None:
    files: dict[object, str] = {77: "disk"}
    flags = READ | MAYREAD
    lines = statements(
        vma(0, 1, flags, file=77, anonymous=False, pgoff=4),
        vma(2, 3, flags, file=77, anonymous=False, pgoff=9),
        files=files,
    )  # fmt: skip
    assert lines == [
        "map(0x0, 0x1000, PROT_READ, MAP_PRIVATE, file(0, DISK), 0x4000);",
        "map(0x2000, 0x1000, PROT_READ, MAP_PRIVATE, file(0, DISK), 0x9000);",
    ]
