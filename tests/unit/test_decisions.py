"""Decisions are recomputed from what the kernel looked at: right ones pass, altered ones fail, both layers agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tracebuilder import PAGE, PRIVATE, Area, ToyKernel, ToySpace, as_tables
from vmatrace.ingest import Trace
from vmatrace.replay import FAILED, PASSED, UNDECIDED, ReplayResult, run
from vmatrace.replay.result import AGREEMENT, DecisionVerdict
from vmatrace.schema import DECISIONS, MERGE_STATES, PROPOSAL_BITS, ROLES
from vmatrace.tracefile import TraceWriter
from vmatrace.vma import FLAG_BITS

RW, RO = FLAG_BITS["READ"] | FLAG_BITS["WRITE"], FLAG_BITS["READ"]
FUNCTIONS = {
    "MERGE_NEW": "vma_merge_new_range", "MERGE_EXISTING": "vma_modify", "SPLIT": "__split_vma",
    "MERGE_EXTEND": "vma_merge_extend", "MERGE_COPIED": "copy_vma", "EXPAND": "vma_expand",
    "MMAP_PREPARE": "ext4_file_mmap_prepare", "COMPAT_MMAP": "compat_vma_mmap",
}  # fmt: skip
PROBES = [{"function": name, "symbol": name, "how": "fentry", "what": what} for what, name in FUNCTIONS.items()]
MERGED, REFUSED = MERGE_STATES["STATE_MERGED"], MERGE_STATES["STATE_REFUSED"]
IN_SECTION = PROPOSAL_BITS["PROPOSAL_IN_SECTION"]
_KERNEL = {"release": "toy", "arch": "x86_64", "page_size": PAGE, "features": {}}


class DecidingKernel(ToyKernel):
    """A toy kernel whose last write section gets decisions."""

    def decide(self, space: ToySpace, what: str, rows: Mapping[str, dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """A decision inside the last section of ``space``; returns its record, to be altered."""
        section = next(values for table, values in reversed(self.records) if table == "sections")
        made = [values for table, values in self.records if table == "decisions"]
        roles = [{**row, "role": ROLES["ROLE_" + role.upper()]} for role, row in rows.items()]
        record = {
            "index": section["index"] - 1, "time": section["time"] - 1, "cpu_seq": len(self.records) + 1,
            "space": space.id, "seq": section["seq"], "pid": space.pid, "tid": space.pid,
            "what": DECISIONS[what], "probe": list(FUNCTIONS).index(what), "op_class": section["op_class"],
            "nr": section["nr"], "entered": section["time"] - 2 - 2 * len(made), "order": len(made) + 1,
            "bits": IN_SECTION, "rows": roles, **fields,
        }  # fmt: skip
        self.records.append(("decisions", record))
        return record

    def replay(
        self,
        path: Path,
        rules: str = "6.18",
        probes: list[dict[str, str]] = PROBES,
        features: Mapping[str, Any] = {},
    ) -> ReplayResult:
        """Write the trace, and judge it."""
        header = {
            "kernel": {**_KERNEL, "features": features}, "layers": ["operations", "decisions"],
            "decisions": {"how": "fentry", "probes": probes, "missing": []},
        }  # fmt: skip
        with TraceWriter(path, header, force=True) as writer:
            writer.write(as_tables(self.records))
            seqs = [space.seq for space in self.spaces]
            writer.finish({"reason": "", "spaces": [space.id for space in self.spaces], "space_seq": seqs})
        return run(Trace(path), rules)


def _only(result: ReplayResult, what: str) -> DecisionVerdict:
    (found,) = [verdict for verdict in result.decisions if verdict.what == what]
    return found


def _map_beside(join: bool, flags: int = RW) -> tuple[DecidingKernel, ToySpace, dict[str, Any]]:
    """A process with one VMA, and a mapping made right above it, with the kernel's answer about merging them."""
    kernel = DecidingKernel()
    space = kernel.start((256, 260, RW))
    below = space.areas[0]
    kernel.map(space, 260, 262, flags, join)
    asked = {"start": 260 * PAGE, "end": 262 * PAGE, "pgoff": 260, "flags": flags | PRIVATE}
    rows = {"prev": below.row()}
    answer = {"state": REFUSED, "result": 0}
    if join:
        rows["result"] = Area(256, 262, RW, below.obj).row()
        answer = {"state": MERGED, "result": below.obj}
    record = kernel.decide(space, "MERGE_NEW", rows, **asked, **answer)
    return kernel, space, record


def test_a_merge_that_the_rules_make_passes_and_both_layers_agree(tmp_path: Path) -> None:
    kernel, _, _ = _map_beside(join=True)
    result = kernel.replay(tmp_path / "a.vmat")
    found = _only(result, "MERGE_NEW")
    assert (found.verdict, found.merged, found.refusals) == (PASSED, True, ())
    assert _only(result, AGREEMENT).verdict == PASSED
    sums = result.to_json()["decisions"]
    assert (sums["merge_attempt"], sums["merge_refused"], sums["passed"], sums["agreed"]) == (1, 0, 1, 1)


def test_a_refused_merge_names_every_condition(tmp_path: Path) -> None:
    kernel, _, record = _map_beside(join=False, flags=RO)
    record["rows"][0] |= {"pgoff": 7, "uffd": 3}
    found = _only(kernel.replay(tmp_path / "a.vmat"), "MERGE_NEW")
    assert (found.verdict, found.merged) == (PASSED, False)
    assert [(each.side, each.rule) for each in found.refusals] == [
        ("left", "flags_equal"), ("left", "uffd_equal"), ("left", "offset_linear"),
    ]  # fmt: skip
    assert "WRITE" in found.refusals[0].text


def _alter(record: dict[str, Any], role: int, field: str, value: Any) -> None:
    row = record if not role else next(row for row in record["rows"] if row["role"] == role)
    row[field] = value


PREV, RESULT = ROLES["ROLE_PREV"], ROLES["ROLE_RESULT"]


@pytest.mark.parametrize(
    ("role", "field", "value"),
    [
        (0, "result", 0), (0, "result", 64), (0, "state", REFUSED), (0, "state", MERGE_STATES["STATE_NOMEM"]),
        (0, "flags", RO | PRIVATE), (0, "pgoff", 3), (0, "file", 9), (0, "uffd", 9), (0, "policy", 3),
        (0, "name", "x"), (0, "start", 261 * PAGE), (0, "end", 263 * PAGE),
        (PREV, "flags", RO | PRIVATE), (PREV, "pgoff", 3), (PREV, "file", 9), (PREV, "object", 64),
        (PREV, "end", 259 * PAGE), (PREV, "start", 255 * PAGE),
        (RESULT, "end", 263 * PAGE), (RESULT, "flags", RO | PRIVATE), (RESULT, "anon_vma", 3),
        (RESULT, "start", 255 * PAGE), (RESULT, "pgoff", 3), (RESULT, "object", 64), (RESULT, "bits", 3),
    ],
)  # fmt: skip
def test_an_altered_merge_does_not_pass(tmp_path: Path, role: int, field: str, value: Any) -> None:
    kernel, _, record = _map_beside(join=True)
    _alter(record, role, field, value)
    result = kernel.replay(tmp_path / "a.vmat")
    verdict = _only(result, "MERGE_NEW").verdict
    # Memory can always run out: that alone proves nothing about the rules.
    assert verdict == (UNDECIDED if value == MERGE_STATES["STATE_NOMEM"] and field == "state" else FAILED)
    assert result.status() == 1 or verdict == UNDECIDED


@pytest.mark.parametrize(
    ("role", "field", "value"),
    [(0, "result", 64), (0, "state", MERGED), (0, "flags", RW | PRIVATE), (PREV, "flags", RO | PRIVATE)],
)
def test_an_altered_refusal_does_not_pass(tmp_path: Path, role: int, field: str, value: Any) -> None:
    kernel, _, record = _map_beside(join=False, flags=RO)
    _alter(record, role, field, value)
    result = kernel.replay(tmp_path / "a.vmat")
    found = _only(result, "MERGE_NEW")
    assert found.verdict == FAILED
    (told,) = [each for each in result.to_json()["divergences"] if each.get("decision") == "MERGE_NEW"]
    assert told["op"] == found.op
    assert told["text"]


def _protect() -> tuple[DecidingKernel, ToySpace, dict[str, Any], dict[str, Any]]:
    """A process that protects the middle of its VMA: the attempt is refused, and two cuts are made."""
    kernel = DecidingKernel()
    space = kernel.start((256, 264, RW))
    whole = space.areas[0]
    kernel.protect(space, 258, 260, RO)
    asked = {"start": 258 * PAGE, "end": 260 * PAGE, "pgoff": 258, "flags": RO | PRIVATE}
    left = Area(258, 264, RW, whole.obj)
    middle = Area(258, 260, RW, whole.obj)
    cuts = [
        kernel.decide(
            space, "SPLIT", {"source": whole.row(), "result": left.row()}, start=258 * PAGE,
            bits=IN_SECTION | PROPOSAL_BITS["PROPOSAL_NEW_BELOW"],
        ),
        kernel.decide(space, "SPLIT", {"source": left.row(), "result": middle.row()}, start=260 * PAGE),
    ]  # fmt: skip
    rows = {"prev": whole.row(), "middle": whole.row(), "result": middle.row()}
    attempt = kernel.decide(space, "MERGE_EXISTING", rows, **asked, state=REFUSED, result=whole.obj)
    return kernel, space, attempt, cuts[0]


def test_a_refused_change_is_cut_free(tmp_path: Path) -> None:
    kernel, _, _, _ = _protect()
    result = kernel.replay(tmp_path / "a.vmat")
    assert [v.verdict for v in result.decisions] == [PASSED] * 4
    (refusal,) = _only(result, "MERGE_EXISTING").refusals
    assert refusal.rule == "interior_never_merges"
    assert result.to_json()["decisions"]["split"] == 2


@pytest.mark.parametrize(
    ("cut", "role", "field", "value"),
    [
        (True, 0, "start", 259 * PAGE), (True, 0, "error", -22), (True, RESULT, "start", 259 * PAGE),
        (True, 0, "bits", IN_SECTION), (True, RESULT, "flags", RO | PRIVATE),
        (False, RESULT, "end", 261 * PAGE), (False, 0, "result", 64), (False, 0, "error", -22),
        (False, RESULT, "flags", RO | PRIVATE), (False, 0, "state", MERGED),
    ],
)  # fmt: skip
def test_an_altered_cut_fails(tmp_path: Path, cut: bool, role: int, field: str, value: Any) -> None:
    kernel, _, attempt, split = _protect()
    _alter(split if cut else attempt, role, field, value)
    result = kernel.replay(tmp_path / "a.vmat")
    assert result.failed_decisions
    assert result.status() == 1


def test_layers_that_disagree_fail_unless_something_was_lost(tmp_path: Path) -> None:
    kernel, space, _ = _map_beside(join=True)
    kernel.map(space, 262, 263, RW, join=True)  # a merge of which no decision tells
    result = kernel.replay(tmp_path / "a.vmat")
    (wrong,) = result.failed_decisions
    assert "0 merges by decisions, 1 by effects" in wrong.reason
    without = [probe for probe in PROBES if probe["what"] != "MERGE_NEW"]
    result = kernel.replay(tmp_path / "a.vmat", probes=without)
    assert not [v for v in result.failed_decisions if v.what == AGREEMENT]
    kernel.decide(space, "MMAP_PREPARE", {}, order=9)  # so others are missing
    result = kernel.replay(tmp_path / "a.vmat")
    assert not [v for v in result.failed_decisions if v.what == AGREEMENT]
    assert "lost" in next(v.reason for v in result.decisions if v.what == AGREEMENT and v.verdict == UNDECIDED)


def test_a_store_elsewhere_is_a_disagreement(tmp_path: Path) -> None:
    kernel, _, _ = _map_beside(join=True)
    section = next(values for table, values in reversed(kernel.records) if table == "sections")
    section["evidence"][0]["end"] += PAGE
    result = kernel.replay(tmp_path / "a.vmat")
    assert "no such store" in next(v.reason for v in result.decisions if v.what == AGREEMENT)


# ---- hooks of files ----

EXT4, SECRETMEM, OVERLAY = 0xEF53, 0x5345434D, 0x794C7630
SHARED_RW = RW | PRIVATE | FLAG_BITS["SHARED"] | FLAG_BITS["MAYSHARE"]
LOCKED_UP = FLAG_BITS["LOCKED"] | FLAG_BITS["DONTDUMP"]


def _desc(flags: int, **fields: Any) -> dict[str, Any]:
    return {"start": 260 * PAGE, "end": 262 * PAGE, "pgoff": 7, "flags": flags, "file": 77, "hook": "hook", **fields}


def _map_file(
    magic: int, before: int, after: int, changed: Mapping[str, Any] = {}, **fields: Any
) -> tuple[DecidingKernel, ToySpace, dict[str, Any]]:
    """A process that maps two pages of file 77, whose mmap_prepare hook leaves ``after`` and ``changed``."""
    kernel = DecidingKernel()
    space = kernel.start((250, 252, RW))
    values = {"file": 77, "mode": 0o100644, "fs_magic": magic, "hooks": 2 | 12, "path": "/tmp/file"}
    kernel.records.append(
        ("files", {"index": 2 * len(kernel.records), "cpu_seq": len(kernel.records) + 1, "time": 1, **values})
    )
    kernel.map(space, 260, 262, RW)
    section, call = (values for _, values in kernel.records[-2:])
    call["file"] = 77  # which a failed call tells
    for row in section["after"]:
        row["file"] = 77 if row["start"] == 260 * PAGE else 0
    descs = [_desc(before), _desc(after, **changed)]
    record = kernel.decide(space, "MMAP_PREPARE", {}, file=77, descs=descs, **fields)
    return kernel, space, record


@pytest.mark.parametrize(
    ("magic", "before", "after", "changed", "verdict"),
    [
        (EXT4, SHARED_RW, SHARED_RW, {"ops": "ext4_file_vm_ops"}, PASSED),
        (EXT4, SHARED_RW, SHARED_RW | FLAG_BITS["LOCKED"], {}, FAILED),
        (EXT4, SHARED_RW, SHARED_RW, {"end": 263 * PAGE}, FAILED),
        (SECRETMEM, SHARED_RW, SHARED_RW | LOCKED_UP, {}, PASSED),
        (SECRETMEM, SHARED_RW, SHARED_RW, {}, FAILED),
        (SECRETMEM, RW | PRIVATE, RW | PRIVATE | LOCKED_UP, {}, FAILED),  # it has to be shared
        (OVERLAY, SHARED_RW, SHARED_RW | FLAG_BITS["PFNMAP"], {}, PASSED),  # a driver's own affair
        (OVERLAY, SHARED_RW, SHARED_RW ^ FLAG_BITS["WRITE"], {}, FAILED),
    ],
)
def test_a_hook_keeps_to_its_rules(
    tmp_path: Path, magic: int, before: int, after: int, changed: dict[str, Any], verdict: str
) -> None:
    kernel, _, _ = _map_file(magic, before, after, changed)
    result = kernel.replay(tmp_path / "a.vmat")
    assert _only(result, "MMAP_PREPARE").verdict == verdict
    assert result.to_json()["decisions"]["mmap_prepare"] == 1


def test_a_hook_that_fails(tmp_path: Path) -> None:
    kernel, _, record = _map_file(SECRETMEM, RW | PRIVATE, RW | PRIVATE, error=-22)
    assert _only(kernel.replay(tmp_path / "a.vmat"), "MMAP_PREPARE").verdict == PASSED
    record["error"] = -13
    assert _only(kernel.replay(tmp_path / "a.vmat"), "MMAP_PREPARE").verdict == FAILED
    kernel, _, _ = _map_file(EXT4, SHARED_RW, SHARED_RW, error=-5)
    assert _only(kernel.replay(tmp_path / "a.vmat"), "MMAP_PREPARE").verdict == UNDECIDED


@pytest.mark.parametrize(
    ("field", "value", "verdict"),
    [
        ("pgoff", 7, PASSED), ("pgoff", 8, FAILED), ("file", 78, FAILED), ("flags", RW, FAILED),
        ("flags", SHARED_RW | FLAG_BITS["MERGEABLE"], PASSED),
    ],
)  # fmt: skip
def test_the_merge_test_is_given_what_the_hook_left(tmp_path: Path, field: str, value: int, verdict: str) -> None:
    kernel, space, hook = _map_file(EXT4, SHARED_RW, SHARED_RW)
    hook["entered"], hook["time"] = hook["time"] - 9, hook["time"] - 8
    asked = {"start": 260 * PAGE, "end": 262 * PAGE, "pgoff": 7, "flags": SHARED_RW, "file": 77, field: value}
    kernel.decide(space, "MERGE_NEW", {"prev": Area(250, 252, RW, 64).row()}, **asked, state=REFUSED)
    result = kernel.replay(tmp_path / "a.vmat")
    assert _only(result, "MMAP_PREPARE").verdict == verdict
    assert _only(result, "MERGE_NEW").verdict == PASSED


@pytest.mark.parametrize(
    ("rules", "left", "flags", "verdict"),
    [
        ("6.18", SHARED_RW | LOCKED_UP, SHARED_RW | LOCKED_UP, PASSED),
        ("6.18", SHARED_RW & ~RW | RO, SHARED_RW, PASSED),  # the layer only adds
        ("6.18", SHARED_RW & ~RW | RO, SHARED_RW & ~RW | RO, FAILED),
        ("7.1", SHARED_RW & ~RW | RO, SHARED_RW & ~RW | RO, PASSED),  # and assigns from 7.0 on
        ("7.1", SHARED_RW & ~RW | RO, SHARED_RW, FAILED),
    ],
)
def test_the_compatibility_layer_hands_the_hook_on(
    tmp_path: Path, rules: str, left: int, flags: int, verdict: str
) -> None:
    kernel, space, hook = _map_file(OVERLAY, SHARED_RW, left)
    row = {"start": 260 * PAGE, "end": 262 * PAGE, "pgoff": 7, "object": 64, "file": 77}
    rows = {"source": {**row, "flags": SHARED_RW}, "result": {**row, "flags": flags}}
    outer = kernel.decide(space, "COMPAT_MMAP", rows, file=77)
    outer["entered"], outer["time"] = hook["entered"] - 1, hook["time"] + 1
    result = kernel.replay(tmp_path / "a.vmat", rules)
    assert _only(result, "COMPAT_MMAP").verdict == verdict


@pytest.mark.parametrize(("end", "verdict"), [(262, PASSED), (263, FAILED)])
def test_an_old_map_grows_its_neighbour(tmp_path: Path, end: int, verdict: str) -> None:
    """Before v6.12 mmap itself decides and calls vma_expand: no attempt is seen, only that."""
    kernel = DecidingKernel()
    space = kernel.start((256, 260, RW))
    below = space.areas[0]
    kernel.map(space, 260, 262, RW, join=True)
    rows = {"source": below.row(), "result": Area(256, end, RW, below.obj).row()}
    kernel.decide(space, "EXPAND", rows, start=256 * PAGE, end=262 * PAGE, pgoff=256)
    features = {"vmg": {"value": False, "detector": "test"}}
    result = kernel.replay(tmp_path / "a.vmat", "6.6", features=features)
    assert _only(result, "EXPAND").verdict == verdict
    assert _only(result, AGREEMENT).verdict == verdict


def test_without_the_layer_there_is_nothing() -> None:
    trace = Trace(Path(__file__).resolve().parents[1] / "data" / "demo.vmat")
    assert not trace.decisions.present
    assert list(trace.decisions) == []
    assert run(trace).to_json()["decisions"] == {}
