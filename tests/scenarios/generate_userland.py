"""Writes userland*.jsonl: the 16 tests of the kernel's tools/testing/vma as scenarios, from one small table.

Run it with no argument in this directory; tests/unit/test_scenarios.py checks that the file is up to date.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = 4096
RW = ("READ", "WRITE", "MAYREAD", "MAYWRITE")
SINCE_6_12 = ("6.12", "6.16", "6.17", "6.18", "6.18+copied_from", "6.19", "7.0", "7.1", "7.2", "7.3")
SINCE_6_16 = SINCE_6_12[1:]
SINCE_6_19 = SINCE_6_12[5:]
STICKY = "MAYBE_GUARD"

Json = dict[str, Any]


def vma(start: int, end: int, *extra: str, av: str | None = None, close: bool = False) -> Json:
    """An anonymous VMA over pages [start, end), its page offset that of its address."""
    return {
        "start": start * PAGE, "end": end * PAGE, "pgoff": start, "flags": [*RW, *extra], "file": None,
        "close": close, "anon_vma": av, "forked": False, "anonymous": True,
    }  # fmt: skip


def scenario(
    name: str,
    rules: tuple[str, ...],
    before: list[Json],
    operation: Json,
    outcome: str,
    after: list[Json],
    **more: Any,
) -> Json:
    """One scenario line."""
    expect = {"outcome": outcome, "errno": more.pop("errno", None), "vmas": after}
    return {
        "name": name, "source": "kernel-test", "rules": list(rules), "page_size": PAGE, **more,
        "vmas": before, "operation": operation, "expect": expect,
    }  # fmt: skip


def new(start: int, end: int, *extra: str, op: str = "merge_new") -> Json:
    """A proposed new range."""
    return {
        "op": op, "start": start * PAGE, "end": end * PAGE, "pgoff": start, "flags": [*RW, *extra],
        "file": None, "anon_vma": None,
    }  # fmt: skip


def modify(start: int, end: int, *extra: str) -> Json:
    """A changed range inside one VMA."""
    return {"op": "modify", "start": start * PAGE, "end": end * PAGE, "flags": [*RW, *extra]}


def simple() -> Iterator[Json]:
    """simple_merge, simple_modify, simple_expand, simple_shrink."""
    yield scenario("simple_merge", SINCE_6_12, [vma(0, 1), vma(2, 3)], new(1, 2), "merge_both", [vma(0, 3)])
    changed = {"op": "modify", "start": PAGE, "end": 2 * PAGE, "flags": ["READ", "MAYREAD"]}
    middle = {**vma(1, 2), "flags": ["READ", "MAYREAD"]}
    yield scenario("simple_modify", SINCE_6_12, [vma(0, 3)], changed, "split", [vma(0, 1), middle, vma(2, 3)])
    grow = {"op": "expand", "vma": 0, "start": 0, "end": 3 * PAGE}
    yield scenario("simple_expand", SINCE_6_12, [vma(0, 1)], grow, "expand", [vma(0, 3)])
    shrink = {"op": "shrink", "vma": 0, "start": 0, "end": PAGE}
    yield scenario("simple_shrink", SINCE_6_12, [vma(0, 3)], shrink, "shrink", [vma(0, 1)])


def merge_new(bits: tuple[bool, bool, bool, bool] = (False,) * 4) -> Iterator[Json]:
    """merge_new: seven proposals in turn; ``bits``: sticky on the proposed range, A, B, C."""
    sticky = any(bits)
    rules = SINCE_6_19 if sticky else SINCE_6_12
    label = "merge_new" + ("." + "".join("ny"[bit] for bit in bits) if sticky else "")
    p, a, b, c = (((STICKY,) if bit else ()) for bit in bits)
    ab = (STICKY,) if p or a or b else ()
    abd, abcd = ab, (STICKY,) if p or a or b or c else ()
    pc = (STICKY,) if p or c else ()

    def first(*extra: str, end: int = 4, **more: Any) -> Json:
        return vma(0, end, *extra, av="d", close=True, **more)

    cases = (
        ([vma(0, 2, *a), vma(3, 4, *b), vma(11, 12, *c)], (7, 9), "none", None),
        ([vma(0, 2, *a, close=True), vma(3, 4, *b, av="d")], (2, 3), "merge_both", [first(*ab)]),
        ([first(*ab)], (4, 5), "merge_left", [first(*ab, end=5)]),
        (
            [first(*abd, end=5), vma(7, 9, *p, av="d", close=True)],
            (6, 7),
            "merge_right",
            [first(*abd, end=5), vma(6, 9, *p, av="d", close=True)],
        ),
        ([first(*abd, end=5), vma(6, 9, *p, av="d")], (5, 6), "merge_both", [first(*abd, end=9)]),
        ([vma(11, 12, *c, av="d")], (10, 11), "merge_right", [vma(10, 12, *pc, av="d")]),
        ([first(*abd, end=9), vma(10, 12, *pc, av="d")], (9, 10), "merge_both", [first(*abcd, end=12)]),
    )
    for letter, (before, (start, end), outcome, after) in zip("abcdefg", cases, strict=True):
        expected = before if after is None else after
        yield scenario(f"{label}.{letter}", rules, before, new(start, end, *p), outcome, expected)


def special() -> Iterator[Json]:
    """vma_merge_special_flags."""
    for flag in ("IO", "DONTEXPAND", "PFNMAP", "MIXEDMAP"):
        left, right = vma(0, 3, flag), vma(3, 4, flag)
        yield scenario(f"special_flags.new.{flag}", SINCE_6_12, [left], new(3, 4, flag), "none", [left])
        both = [left, right]
        yield scenario(f"special_flags.existing.{flag}", SINCE_6_12, both, modify(3, 4, flag), "none", both)


def with_close() -> Iterator[Json]:
    """vma_merge_with_close and vma_merge_new_with_close. B is what is changed, so it starts out different."""
    prev, after = vma(0, 3), vma(5, 9, close=True)
    yield scenario("close.a", SINCE_6_12, [prev, after], new(3, 5), "merge_left", [vma(0, 5), after])
    middle, changed = vma(3, 5, "EXEC", close=True), vma(3, 5, close=True)
    same = {"anonymous": True}
    for letter, before in (
        ("b", [prev, middle]),
        ("c", [middle, vma(5, 9)]),
        ("d", [prev, middle, vma(5, 9)]),
    ):
        expected = [{**changed, **same} if item is middle else item for item in before]
        yield scenario(f"close.{letter}", SINCE_6_12, before, modify(3, 5), "none", expected)
    before = [prev, vma(3, 5, "EXEC"), after]
    yield scenario("close.e", SINCE_6_12, before, modify(3, 5), "merge_left", [vma(0, 5), after])
    low, high = vma(0, 2, close=True), vma(5, 7, close=True)
    yield scenario(
        "new_with_close", SINCE_6_12, [low, high], new(2, 5), "merge_left", [vma(0, 5, close=True), high]
    )


def merge_existing(bits: tuple[bool, bool, bool] = (False,) * 3) -> Iterator[Json]:
    """merge_existing: the changed VMA carries an anon_vma; ``bits``: sticky on prev, middle, next."""
    sticky = any(bits)
    rules = SINCE_6_19 if sticky else SINCE_6_16
    label = "merge_existing" + ("." + "".join("ny"[bit] for bit in bits) if sticky else "")
    p, m, n = (((STICKY,) if bit else ()) for bit in bits)
    mn, pm = (STICKY,) if m or n else (), (STICKY,) if p or m else ()
    pmn = (STICKY,) if p or m or n else ()

    def mid(start: int, end: int, close: bool = False) -> Json:
        return vma(start, end, "EXEC", *m, av="d", close=close)

    cases = (
        ("a", [mid(2, 6, True), vma(6, 9, *n, close=True)], (3, 6), "merge_right",
         [mid(2, 3, True), vma(3, 9, *mn, av="d", close=True)]),
        ("b", [mid(2, 6), vma(6, 9, *n, close=True)], (2, 6), "merge_right",
         [vma(2, 9, *mn, av="d", close=True)]),
        ("c", [vma(0, 3, *p, close=True), mid(3, 7, True)], (3, 6), "merge_left",
         [vma(0, 6, *pm, av="d", close=True), mid(6, 7, True)]),
        ("d", [vma(0, 3, *p, close=True), mid(3, 7)], (3, 7), "merge_left",
         [vma(0, 7, *pm, av="d", close=True)]),
        ("e", [vma(0, 3, *p, close=True), mid(3, 7), vma(7, 9, *n)], (3, 7), "merge_both",
         [vma(0, 9, *pmn, av="d", close=True)]),
    )  # fmt: skip
    for letter, before, (start, end), outcome, after in cases:
        yield scenario(f"{label}.{letter}", rules, before, modify(start, end, *m), outcome, after)
    for start, end in ((4, 5), (5, 6), (6, 7), (4, 7), (4, 6)):
        before = [vma(0, 3, *p), mid(3, 8), vma(8, 10, *n)]
        pieces = [mid(3, start), vma(start, end, *m, av="d"), mid(end, 8)]
        name = f"{label}.f.{start}-{end}"
        yield scenario(name, rules, before, modify(start, end, *m), "split", [before[0], *pieces, before[2]])


def anon_vmas() -> Iterator[Json]:
    """anon_vma_non_mergeable, dup_anon_vma."""
    prev, next = vma(0, 3, av="x"), vma(7, 9, av="y")
    left = [vma(0, 7, av="x"), next]
    before = [prev, vma(3, 7, "EXEC"), next]
    yield scenario("non_mergeable.existing", SINCE_6_12, before, modify(3, 7), "merge_left", left)
    yield scenario("non_mergeable.new", SINCE_6_12, [prev, next], new(3, 7), "merge_left", left)
    grow = {"op": "expand", "vma": 0, "start": 0, "end": 5 * PAGE}
    taken = [vma(0, 5, av="d")]
    yield scenario("dup_anon_vma.expand", SINCE_6_12, [vma(0, 3), vma(3, 5, av="d")], grow, "expand", taken)
    before = [vma(0, 3), vma(3, 5, "EXEC"), vma(5, 8, av="d")]
    whole = [vma(0, 8, av="d")]
    yield scenario("dup_anon_vma.next", SINCE_6_12, before, modify(3, 5), "merge_both", whole)
    before = [vma(0, 3), vma(3, 5, "EXEC", av="d"), vma(5, 8)]
    yield scenario("dup_anon_vma.middle", SINCE_6_16, before, modify(3, 5), "merge_both", whole)
    before, rest = [vma(0, 3), vma(3, 8, "EXEC", av="d")], vma(5, 8, "EXEC", av="d")
    yield scenario("dup_anon_vma.left", SINCE_6_16, before, modify(3, 5), "merge_left", [*taken, rest])
    before, rest = [vma(0, 5, "EXEC", av="d"), vma(5, 8)], vma(0, 3, "EXEC", av="d")
    after = [rest, vma(3, 8, av="d")]
    yield scenario("dup_anon_vma.right", SINCE_6_16, before, modify(3, 5), "merge_right", after)


def out_of_memory() -> Iterator[Json]:
    """vmi_prealloc_fail: nothing has changed afterwards."""
    fail = {"fail_prealloc": True}
    before = [vma(0, 3), vma(3, 5, "EXEC", av="d")]
    yield scenario(
        "prealloc_fail.existing",
        SINCE_6_16,
        before,
        modify(3, 5),
        "error",
        before,
        errno="ENOMEM",
        config=fail,
    )
    before = [vma(0, 3), vma(3, 5, av="d")]
    grow = {"op": "expand", "vma": 0, "start": 0, "end": 5 * PAGE}
    yield scenario(
        "prealloc_fail.expand", SINCE_6_12, before, grow, "error", before, errno="ENOMEM", config=fail
    )


def callers() -> Iterator[Json]:
    """merge_extend, copy_vma, expand_only_mode, mmap_region_basic."""
    grow = {"op": "merge_extend", "vma": 0, "delta": 2 * PAGE}
    yield scenario("merge_extend", SINCE_6_12, [vma(0, 1), vma(3, 4)], grow, "merge_both", [vma(0, 4)])
    copy = {"op": "copy_vma", "vma": 0, "to": 0, "length": 2 * PAGE}
    yield scenario("copy_vma.new", SINCE_6_12, [vma(3, 5)], copy, "copy", [vma(0, 2), vma(3, 5)])
    copy = {"op": "copy_vma", "vma": 0, "to": 4 * PAGE, "length": 2 * PAGE}
    merged = [vma(0, 2), vma(4, 8)]
    yield scenario("copy_vma.merge", SINCE_6_12, [vma(0, 2), vma(6, 8)], copy, "merge_right", merged)
    before = [vma(0, 2), vma(3, 5)]
    yield scenario(
        "expand_only", SINCE_6_12, before, new(5, 9, op="expand_only"), "expand", [vma(0, 2), vma(3, 9)]
    )
    yield mmap_region_basic()


def mmap_region_basic() -> Json:
    """Four anonymous maps of three pages in turn; two VMAs result."""
    steps = []
    for page in (0x300, 0x250, 0x303, 0x24D):
        steps.append({"operation": {**new(page, page + 3, op="mmap"), "flags": [*RW, "NORESERVE"]}})
    after = [{**vma(0x24D, 0x253), "pgoff": 0x24D}, vma(0x300, 0x306)]
    flags = [*RW, "NORESERVE", "SOFTDIRTY"]
    steps[-1]["expect"] = {"outcome": "merge_right", "vmas": [{**item, "flags": flags} for item in after]}
    return {
        "name": "mmap_region_basic", "source": "kernel-test", "rules": list(SINCE_6_12[1:]),
        "page_size": PAGE,
        "vmas": [], "steps": steps,
    }  # fmt: skip


def plain() -> Iterator[Json]:
    """The 16 tests, in the order of the kernel's file."""
    yield from simple()
    yield from merge_new()
    yield from special()
    yield from with_close()
    yield from merge_existing()
    yield from anon_vmas()
    yield from out_of_memory()
    yield from callers()


def permuted() -> Iterator[Json]:
    """merge_new and merge_existing again, with every way to spread the sticky bit (v6.19)."""
    for four in itertools.product((False, True), repeat=4):
        if any(four):
            yield from merge_new(four)
    for three in itertools.product((False, True), repeat=3):
        if any(three):
            yield from merge_existing(three)


FILES = {"userland.jsonl": plain, "userland-sticky.jsonl": permuted}


def text(name: str) -> str:
    """The content of one file."""
    return "".join(json.dumps(item, separators=(",", ":")) + "\n" for item in FILES[name]())


if __name__ == "__main__":
    for file in FILES:
        Path(__file__).with_name(file).write_text(text(file), encoding="utf-8")
