"""A trace opened: its operations, address spaces, files and states, all from one reading of the file."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.ingest import match as matching
from vmatrace.ingest.decisions import Decisions
from vmatrace.ingest.decode import BatchRows
from vmatrace.ingest.effects import EFFECTS, Effect
from vmatrace.ingest.files import KnownFiles
from vmatrace.ingest.match import Operations, group_sections, match, section_faults
from vmatrace.ingest.objects import ObjectIds
from vmatrace.ingest.records import Records, load
from vmatrace.ingest.spaces import find_spaces
from vmatrace.ingest.states import BASE, UNKNOWN, Picture, SpaceStates
from vmatrace.ingest.untold import resolve
from vmatrace.ingest.vanished import recount, section_effects
from vmatrace.ingest.views import FileInfo, Operation, Section, Space
from vmatrace.schema import KINDS, OP_CLASSES
from vmatrace.syscalls import call_name, find_call
from vmatrace.tracefile import TraceFile
from vmatrace.vma import Vma

Array = npt.NDArray[Any]

_MREMAP: Final = OP_CLASSES["OP_MREMAP"]
_DECODED_BATCHES: Final = 3


class Trace:
    """Everything that one trace file tells.

    ``header`` and ``end`` are those of the file; ``complete`` is False (and ``warning`` says why) where it is
    cut. ``operations`` holds columns; `operation` and `iter_operations` give values. ``spaces``: those by id.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the trace at ``path``; raises BadTrace where it is none."""
        self.file = TraceFile(path)
        self.path = self.file.path
        self.records: Records = load(self.file)
        self.header: Mapping[str, Any] = self.file.header
        self.end: Mapping[str, Any] = self.file.end
        self.complete = self.file.complete
        self.warning = self.file.warning
        self.groups = group_sections(self.records)
        self.lost_sections, self.miscounted_sections = section_faults(self.records, self.groups.order)
        self.spaces: dict[int, Space] = find_spaces(self.records, self.groups)
        self._lost = set(self.lost_sections.tolist())
        self._objects: ObjectIds | None = None
        self._batches: OrderedDict[int, BatchRows] = OrderedDict()
        self._states: dict[int, SpaceStates] = {}
        self._bases: dict[int, tuple[tuple[Vma, ...], tuple[tuple[int, int], ...]]] = {}
        self.files = KnownFiles(self.records)
        self.operations: Operations = match(self.records, self.groups, lambda untold: resolve(self, untold))
        #: The trace shows when VMA objects die (not before 6.14, where that comes too late).
        self.deaths: bool = self.records.deaths and _header_says(self.header, "deaths", True)
        #: Calls that change credentials, exec among them, say what they left (USER_ARGUMENTS in schema.py).
        self.credentials: bool = _header_says(self.header, "credentials", False)
        if not self.deaths or self.feature("munmap_new_outside") is False:
            recount(self)
        elif self.records.freed:
            recount(self, self.records.freed)

    # ---- about the trace ----

    @property
    def kernel(self) -> Mapping[str, Any]:
        """The kernel's profile as the header has it; empty where it says nothing."""
        kernel = self.header.get("kernel")
        return kernel if isinstance(kernel, dict) else {}

    def feature(self, name: str) -> bool | None:
        """Whether the traced kernel has a feature, None where the header does not know."""
        features = self.kernel.get("features")
        found = features.get(name) if isinstance(features, dict) else None
        value = found.get("value") if isinstance(found, dict) else None
        return value if isinstance(value, bool) else None

    @property
    def arch(self) -> str:
        """Architecture as ``uname -m`` names it."""
        return str(self.kernel.get("arch") or self.header.get("machine") or "x86_64")

    @property
    def page_size(self) -> int:
        """Bytes of a page on the traced machine."""
        size = self.kernel.get("page_size")
        return size if isinstance(size, int) and size > 0 and size & (size - 1) == 0 else 4096

    @property
    def page_shift(self) -> int:
        """log2 of the page size."""
        return self.page_size.bit_length() - 1

    @cached_property
    def decisions(self) -> Decisions:
        """The decisions layer; empty where the trace has none."""
        return Decisions(self)

    @property
    def lost_records(self) -> int:
        """How many records the recording is known to have lost."""
        noted = sum(int(row["lost"]) for row in self.records.losses)
        found = len(self.records.gaps) or len(self.lost_sections)
        return max(noted, int(self.end.get("lost", 0)), found)

    def spaces_of(self, pid: int) -> list[Space]:
        """The address spaces that process ``pid`` lived in, oldest first: its generations."""
        return sorted((s for s in self.spaces.values() if pid in s.pids), key=lambda s: s.index)

    def pids(self) -> list[int]:
        """All traced processes, in the order in which they appear."""
        return list(dict.fromkeys(pid for space in self.spaces.values() for pid in space.pids))

    # ---- operations ----

    def operation_row(self, space: int, n: int) -> int:
        """The row of operation ``n`` of an address space. Raises KeyError where there is none."""
        lo, hi = np.searchsorted(self.operations.space, (space, space + 1))
        if not 0 <= n < hi - lo:
            raise KeyError(f"address space {space} has no operation {n}")
        return int(lo) + n

    def operation_rows(self, space: int) -> range:
        """The rows of all operations of an address space, in order."""
        lo, hi = np.searchsorted(self.operations.space, (space, space + 1))
        return range(int(lo), int(hi))

    def iter_operations(self, space: int | None = None) -> Iterator[Operation]:
        """All operations in the order in which they began; of one address space where it is given."""
        rows: Any = self.operation_rows(space) if space is not None else self._global_order().tolist()
        for row in rows:
            yield self.operation(row)

    def _global_order(self) -> Array:
        return np.argsort(self.operations.order, kind="stable")

    def operation(self, row: int) -> Operation:
        """The operation in that row of ``operations``."""
        table = self.operations
        sections = tuple(
            self.section(int(number)) for number in table.sections[table.first[row] : table.first[row + 1]]
        )
        who, call = self._who(row, sections)
        kind = matching.KIND_NAMES[table.kind[row]]
        name, args = _named(self.arch, who["abi"], who["nr"], call["args"], kind)
        effects = {name: int(table.effects[name][row]) for name in EFFECTS}
        return Operation(
            space=int(table.space[row]),
            n=int(table.number[row]),
            kind=kind,
            name=name,
            **who,
            args=args,
            result=call["result"],
            changed=bool(table.changed[row]),
            reason=self._reason(row, sections),
            miscounted=bool(table.flags[row] & matching.MISCOUNTED),
            effects=effects,
            sections=sections,
            detail=self._detail(sections, call, bool(effects["grow"])),
            task=self.records.tasks[table.task[row]] if table.task[row] >= 0 else None,
            raw_args=call["args"],
        )

    def _who(self, row: int, sections: tuple[Section, ...]) -> tuple[dict[str, int], dict[str, Any]]:
        table, calls = self.operations, self.records.calls
        number = int(table.call[row])
        call: dict[str, Any] = {"args": (), "result": None}
        source: Any
        if number >= 0:
            source = {name: int(calls[name][number]) for name in ("pid", "tid", "time", "abi", "nr")}
            args, result = self.call_of(row)
            call = {"args": args, "result": result}
        elif table.task[row] >= 0:
            task = self.records.tasks[table.task[row]]
            source = {"pid": task["pid"], "tid": task["tid"], "time": task["time"], "abi": 0, "nr": 0}
        else:
            first = sections[0]
            source = {name: getattr(first, name) for name in ("pid", "tid", "time", "abi", "nr")}
        return {**source, "index": int(table.order[row])}, call

    def call_of(self, row: int) -> tuple[tuple[int, ...], int | None]:
        """Arguments and result of the call of an operation; nothing where it has none."""
        number = int(self.operations.call[row])
        if number < 0:
            return (), None
        batch, at = self._place(self.records.call_batch, self.records.call_row, number)
        return self._batch(batch).call_args(at), int(self.records.calls["result"][number])

    def _detail(self, sections: tuple[Section, ...], call: dict[str, Any], grown: bool) -> tuple[Effect, ...]:
        found: list[Effect] = []
        for section in sections:
            effects = section_effects(self.arch, section, call["args"], call["result"], self.page_size, self.deaths)
            merge = next((effect for effect in effects if effect.kind == "merge"), None)
            if section.op_class == _MREMAP and grown and merge is not None:
                effects.append(Effect("grow", merge.obj, merge.start, merge.end, merge.old))
            found += effects
        return tuple(found)

    def _reason(self, row: int, sections: tuple[Section, ...]) -> str:
        flags, kind = self.operations.flags[row], self.operations.kind[row]
        if flags & matching.LOST:
            return "lost records"
        if kind != matching.OTHER:
            return ""
        section = sections[0]
        call = find_call(self.arch, section.abi, section.nr)
        if call is None:
            return f"changed by {call_name(self.arch, section.abi, section.nr)}, which is not listed"
        return f"{call.name} did not return" if section.op_class else f"changed inside {call.name} by another cause"

    # ---- sections ----

    def section(self, number: int) -> Section:
        """The write section of that number."""
        batch, at = self._place(self.records.section_batch, self.records.section_row, number)
        return self._batch(batch).section(at, number, number in self._lost, self.records)

    def walk_vmas(self, source: int) -> tuple[Vma, ...]:
        """The VMAs of one walk (see `Picture`): its own ones only."""
        side, walk = source & 1, source >> 1
        covers = self.records.after if side else self.records.before
        number = int(np.searchsorted(covers.first, walk, side="right")) - 1
        batch, at = self._place(self.records.section_batch, self.records.section_row, number)
        first = int(covers.rows[covers.first[number] : walk].sum())
        return self._batch(batch).vmas(at, side, first, first + int(covers.rows[walk]))

    def walk_section(self, source: int) -> int:
        """The number of the section that a walk belongs to."""
        covers = self.records.after if source & 1 else self.records.before
        return int(np.searchsorted(covers.first, source >> 1, side="right")) - 1

    def _place(self, batches: Array, rows: Array | None, number: int) -> tuple[int, int]:
        row = number if rows is None else int(rows[number])
        batch = int(np.searchsorted(batches, row, side="right")) - 1
        return batch, row - int(batches[batch])

    def _batch(self, number: int) -> BatchRows:
        found = self._batches.get(number)
        if found is None:
            tables = self.file.batch(number)
            if tables is None:
                raise RuntimeError("the trace changed while it was read")
            first = int(self.records.section_batch[number])
            numbers = self._place_of_rows(first, tables["sections"].rows)
            found = BatchRows(tables, numbers, self.objects(), self.files, self.header.get("machine"))
            while len(self._batches) >= _DECODED_BATCHES:
                self._batches.popitem(last=False)
            self._batches[number] = found
        else:
            self._batches.move_to_end(number)
        return found

    def _place_of_rows(self, first: int, count: int) -> Array:
        """The section numbers of a batch's rows."""
        rows = self.records.section_row
        if rows is None:
            return np.arange(first, first + count)
        return np.argsort(rows)[first : first + count]

    def objects(self) -> ObjectIds:
        """The ids of VMA objects (made when first asked for)."""
        if self._objects is None:
            births = self.records.births
            spaces = self.records.sections["space"][births["section"]]
            self._objects = ObjectIds(births["object"], spaces, births["section"])
        return self._objects

    # ---- states ----

    def states(self, space: int) -> SpaceStates:
        """The states of one address space."""
        found = self._states.get(space)
        if found is None:
            sections = self.groups.of(space)
            lost = np.isin(sections, self.lost_sections)
            based = space in self.spaces and self.spaces[space].origin == "fork"
            found = self._states[space] = SpaceStates(self.records, sections, lost, based)
        return found

    def known(self, space: int, picture: Picture) -> tuple[list[tuple[Vma, int]], list[tuple[int, int]]]:
        """The VMAs that a picture shows, each with its source, and the intervals that are unknown."""
        vmas: list[tuple[Vma, int]] = []
        holes: list[tuple[int, int]] = []
        for start, end, source in zip(
            picture.start.tolist(), picture.end.tolist(), picture.source.tolist(), strict=True
        ):
            if source == UNKNOWN:
                _add_hole(holes, start, end)
                continue
            if source == BASE:
                rows, unknown = self.base(space)
                for lo, hi in unknown:
                    if lo < end and start < hi:
                        _add_hole(holes, max(lo, start), min(hi, end))
            else:
                rows = self.walk_vmas(source)
            for vma in rows:
                if vma.end <= start or end <= vma.start:
                    continue
                if start <= vma.start and vma.end <= end:
                    vmas.append((vma, source))
                else:  # half of it was seen otherwise later, and what became of the rest was not
                    _add_hole(holes, max(vma.start, start), min(vma.end, end))
        return vmas, holes

    def base(self, space: int) -> tuple[tuple[Vma, ...], tuple[tuple[int, int], ...]]:
        """What an address space born by fork began with: its parent's VMAs, copied by the rules of fork."""
        found = self._bases.get(space)
        if found is None:
            from vmatrace.ingest.forks import copied_state

            found = self._bases[space] = copied_state(self, self.spaces[space])
        return found

    def tail_lost(self, space: int) -> bool:
        """Whether the trace is whole but does not show how this address space ended, or its last sections."""
        sections, table = self.groups.of(space), self.records.sections
        if not self.complete or not len(sections) or table["kind"][sections[-1]] == KINDS["LAST"]:
            return False
        alive = dict(zip(self.end.get("spaces", ()), self.end.get("space_seq", ()), strict=False))
        return space not in alive or alive[space] > int(table["seq"][sections[-1]])

    # ---- files ----

    def file_info(self, file_id: object) -> FileInfo | None:
        """The file behind ``Vma.file``; None where it was not described."""
        return self.files.by_id.get(file_id) if isinstance(file_id, int) else None

    def close(self) -> None:
        """Close the file."""
        self._batches.clear()
        self.file.close()


def _add_hole(holes: list[tuple[int, int]], start: int, end: int) -> None:
    if holes and holes[-1][1] == start:
        holes[-1] = (holes[-1][0], end)
    else:
        holes.append((start, end))


def _header_says(header: Mapping[str, Any], name: str, default: bool) -> bool:
    """Whether this kind of evidence is to be expected; ``default`` where a trace does not say."""
    evidence = header.get("evidence")
    return bool(evidence.get(name, default)) if isinstance(evidence, dict) else default


def _named(arch: str, abi: int, nr: int, raw: tuple[int, ...], kind: str) -> tuple[str, dict[str, int]]:
    """The plain name and named arguments of a call; old multiplexed forms are taken apart."""
    if not raw:
        if kind in ("call", "other"):
            return call_name(arch, abi, nr), {}
        return kind, {}
    call = find_call(arch, abi, nr)
    if call is None:
        return f"syscall_{nr}", {}
    args = dict(zip(call.arguments, raw, strict=False))
    if call.name == "mmap2":
        return "mmap", {**args, "off": args["pgoff"] * 4096}
    if call.name == "old_mmap":
        return "mmap", args
    if call.name == "ipc" and args["call"] & 0xFFFF == 21:
        return "shmat", {"shmid": args["first"], "shmaddr": args["ptr"], "shmflg": args["second"]}
    if call.name == "old_mmap":
        return "mmap", args
    if call.name == "ipc" and args["call"] & 0xFFFF == 22:
        return "shmdt", {"shmaddr": args["ptr"]}
    return call.name, args


def errno_name(result: int | None) -> str | None:
    """The symbolic errno of a system call's return value, None where it succeeded or did not return."""
    if result is None or not -4095 <= result < 0:
        return None
    return errno.errorcode.get(-result, str(-result))
