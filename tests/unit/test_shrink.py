"""Delta debugging: the fewest steps that fail still, and their text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmatrace.replay.history import CALL, FORK, TOUCH, Step
from vmatrace.replay.shrink import minimal
from vmatrace.replay.stage import SCENARIO_BASE, Stage, places_of, program


@given(st.integers(1, 300), st.sets(st.integers(0, 299), max_size=6))
def test_the_steps_that_matter_are_found_and_nothing_else(count: int, needed: set[int]) -> None:
    matter = {step for step in needed if step < count} | {count - 1}
    rounds = 0

    def fails(candidates: list[list[int]]) -> list[bool]:
        nonlocal rounds
        rounds += 1
        assert all(candidate == sorted(candidate) and candidate[-1] == count - 1 for candidate in candidates)
        return [matter <= set(candidate) for candidate in candidates]

    assert minimal(count, fails) == sorted(matter)
    assert rounds < 60


def test_what_does_not_repeat_is_given_up_after_one_round() -> None:
    rounds = []

    def never(candidates: list[list[int]]) -> list[bool]:
        rounds.append(len(candidates))
        return [False] * len(candidates)

    assert minimal(100, never) is None
    assert len(rounds) == 1


FAR = 1 << 40
STEPS = [
    Step(CALL, "mmap", {"addr": 0x7F0000003000, "len": 0x4000, "prot": 3, "flags": 0x32, "fd": 0, "off": 0}),
    Step(TOUCH, args={"addr": 0x7F0000003000}),
    Step(FORK),
    Step(CALL, "mremap", {"addr": 0x7F0000004000, "old_len": 0x1000, "new_len": 0x1000, "flags": 3, "new_addr": FAR}),
]


def test_addresses_keep_their_distance_and_far_ones_come_near() -> None:
    places = places_of(STEPS)
    first, moved = places.offset(0x7F0000003000), places.offset(0x7F0000004000)
    assert first is not None
    assert moved == first + 0x1000
    assert first % (2 << 20) == 0x3000
    assert places.offset(FAR) is not None
    assert places.offset(0x1234) is None
    assert places.length < 64 << 20


def test_steps_are_calls_in_the_area_and_operations_of_a_scenario() -> None:
    stage = Stage(places_of(STEPS), (), {})
    first = stage.places.offset(0x7F0000003000)
    assert stage.statement(STEPS[0]) == f"syscall(SYS_mmap, area + {first:#x}, 0x4000ul, 0x3ul, 0x32ul, -1, 0x0ul)"
    assert stage.statement(STEPS[1]) == f"poke(area + {first:#x})"
    assert stage.statement(STEPS[2]) == "go_on_in_a_child()"
    operation = stage.scenario(STEPS[0], 0x5000)
    assert operation is not None
    assert operation["addr"] == operation["picked"] == SCENARIO_BASE + (first or 0)
    assert stage.scenario(STEPS[2], 0) == {"op": "fork", "follow": 1}
    no_key = Step(CALL, "pkey_mprotect", {"start": 0x7F0000003000, "len": 0x1000, "prot": 3, "pkey": 2**64 - 1})
    assert (stage.scenario(no_key, 0) or {})["pkey"] == -1


def test_a_program_holds_only_the_steps_of_its_candidates() -> None:
    text = program(Stage(places_of(STEPS), (), {}), STEPS, [[0, 3], [3]])
    assert "step_0(" in text
    assert "step_1(" not in text
    assert "static const int candidate_0[] = { 0, 1, -1 };" in text
    assert "static const int candidate_1[] = { 1, -1 };" in text
