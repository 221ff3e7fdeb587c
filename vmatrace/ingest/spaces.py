"""Finds the address spaces of a trace: how each began, who lived in it, when it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from vmatrace.ingest.match import Groups, is_snapshot
from vmatrace.ingest.records import Records
from vmatrace.ingest.views import Space
from vmatrace.schema import KINDS, OP_CLASSES

_FORK: Final = KINDS["FORK"]
_SPACE_END: Final = KINDS["SPACE_END"]


def find_spaces(records: Records, groups: Groups) -> dict[int, Space]:
    """All address spaces by id, oldest first."""
    spaces: dict[int, Space] = {}
    for number in np.flatnonzero(records.sections["kind"] == KINDS["EXEC"]).tolist():
        _add_section(spaces, records, number, "exec")
    for task in records.tasks:
        if task["kind"] == _FORK and task["space"] != task["parent_space"]:
            _add_fork(spaces, task, records, groups)
    for span in groups.spans.values():
        first = int(groups.order[span.start])
        snapshot = bool(is_snapshot(records.sections, slice(first, first + 1))[0])
        _add_section(spaces, records, first, "snapshot" if snapshot else "unknown")
    _add_callers(spaces, records)
    for task in records.tasks:  # threads, and processes that share an address space
        shared = spaces.get(task["space"])
        if task["kind"] == _FORK and shared is not None and task["pid"] not in shared.pids:
            shared.pids.append(task["pid"])
    for task in records.tasks:
        space = spaces.get(task["space"])
        if task["kind"] == _SPACE_END and space is not None:
            space.ended = int(task["time"])
    for number, comm in records.comms.items():
        if number in spaces:
            spaces[number].comm = comm
    return dict(sorted(spaces.items(), key=lambda item: item[1].index))


def _add_fork(spaces: dict[int, Space], task: Mapping[str, Any], records: Records, groups: Groups) -> None:
    space = spaces.get(task["space"])
    if space is None:
        parent = task["parent_space"]
        snapshot = parent == 0
        space = Space(
            task["space"],
            task["pid"],
            task["tid"],
            "snapshot" if snapshot else "fork",
            task["index"],
            task["time"],
        )
        if not snapshot:
            space.parent, space.fork_task = parent, task
            space.fork_section = _fork_section(records, groups, task)
        spaces[space.id] = space
    if not space.pids:
        space.pids.append(task["pid"])


def _fork_section(records: Records, groups: Groups, task: Mapping[str, Any]) -> int | None:
    """The section in which the parent was copied: the forking task's last one before the child."""
    sections = groups.of(task["parent_space"])
    table = records.sections
    before = int(np.searchsorted(table["index"][sections], task["index"]))
    # The parent's other threads may have come between: look back a while.
    for number in sections[max(0, before - 4096) : before][::-1].tolist():
        if table["tid"][number] == task["parent_tid"]:
            return int(number) if table["op_class"][number] == OP_CLASSES["OP_FORK"] else None
    return None


def _add_section(spaces: dict[int, Space], records: Records, number: int, origin: str) -> None:
    table = records.sections
    values = {name: int(table[name][number]) for name in ("space", "pid", "tid", "index", "acquired")}
    space = spaces.get(values["space"])
    if space is None:
        space = Space(values["space"], values["pid"], values["tid"], origin, values["index"], values["acquired"])
        spaces[space.id] = space
    if not space.pids:
        space.pids.append(values["pid"])


def _add_callers(spaces: dict[int, Space], records: Records) -> None:
    """Address spaces known from calls alone: their birth was lost."""
    calls = records.calls
    known = np.array(list(spaces), np.uint32)
    for row in np.flatnonzero(~np.isin(calls["space"], known)).tolist():
        number = int(calls["space"][row])
        if number not in spaces:
            pid, tid = int(calls["pid"][row]), int(calls["tid"][row])
            index, time = int(calls["index"][row]), int(calls["time"][row])
            spaces[number] = Space(number, pid, tid, "unknown", index, time, pids=[pid])
