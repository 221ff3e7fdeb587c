"""Decisions as values: what probed functions of the kernel were asked and what they answered, each tied to its
operation.

They are decoded batch by batch when they are asked for; of all of them only a few columns are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.decode import common_flags
from vmatrace.ingest.match import is_snapshot
from vmatrace.schema import DECISIONS, MERGE_STATES, PROPOSAL_BITS, ROLES
from vmatrace.tracefile import Table

if TYPE_CHECKING:
    from vmatrace.ingest.trace import Trace

Array = npt.NDArray[Any]
Row = tuple[int, int, int, int, int, int, int, int, int, int, str]
"""start, end, flags, pgoff, bits, object, anon_vma, file, uffd, policy, name: as the trace has them."""

MERGED: Final = MERGE_STATES["STATE_MERGED"]
REFUSED: Final = MERGE_STATES["STATE_REFUSED"]
NOMEM: Final = MERGE_STATES["STATE_NOMEM"]
IN_SECTION: Final = PROPOSAL_BITS["PROPOSAL_IN_SECTION"]
MERGES: Final = frozenset(("MERGE_NEW", "MERGE_EXISTING", "MERGE_EXTEND", "MERGE_COPIED"))
"""Kinds of merge attempts."""

_NAMES: Final = {number: name for name, number in DECISIONS.items()}
_ROLES: Final = {number: name.removeprefix("ROLE_").lower() for name, number in ROLES.items()}
_NUMBERS: Final = (
    "index", "time", "space", "seq", "pid", "tid", "what", "probe", "op_class", "abi", "nr", "entered", "order",
    "result", "error", "state", "start", "end", "pgoff", "flags", "file", "anon_vma", "uffd", "policy",
    "anon_pgoff",
)  # fmt: skip
_KEPT: Final = (
    ("index", np.uint64), ("time", np.uint64), ("entered", np.uint64), ("space", np.uint32), ("seq", np.uint32),
    ("tid", np.uint32), ("what", np.uint8), ("state", np.uint8), ("bits", np.uint32), ("order", np.uint32),
)  # fmt: skip
_VMA: Final = ("start", "end", "flags", "pgoff", "bits", "object", "anon_vma", "file", "uffd", "policy")
_DESCRIPTOR: Final = ("start", "end", "pgoff", "flags", "private", "file", "action")
_UNMAP_COMPLETE: Final = DECISIONS["UNMAP_COMPLETE"]
_BATCHES: Final = 3


class Descriptor(NamedTuple):
    """A vm_area_desc before or after a hook; ``ops`` and ``hook`` are symbols, ``file`` what the VMA will hold."""

    start: int
    end: int
    pgoff: int
    flags: int
    private: int
    file: int
    action: int
    ops: str
    hook: str


class Decision(NamedTuple):
    """One call of a probed function; columns as in the schema, ``place`` is its index.

    ``what``: a name of DECISIONS; ``function``: the probed one. ``rows``: the VMAs that it looked at by their
    role (prev, middle, next, copied_from, source, result), ``offsets`` their second page offsets where the kernel
    has those.
    """

    place: int
    time: int
    space: int
    seq: int
    pid: int
    tid: int
    what: str
    function: str
    op_class: int
    abi: int
    nr: int
    entered: int
    order: int
    result: int
    error: int
    state: int
    start: int
    end: int
    pgoff: int
    flags: int
    file: int
    anon_vma: int
    uffd: int
    policy: int
    anon_pgoff: int
    name: str
    bits: int
    delta: int
    rows: Mapping[str, Row]
    offsets: Mapping[str, int]
    descs: tuple[Descriptor, ...]

    @property
    def attempt(self) -> bool:
        """Whether it is a merge attempt."""
        return self.what in MERGES

    @property
    def merged(self) -> bool:
        """Whether a merge attempt succeeded."""
        if self.state:
            return self.state == MERGED
        if self.what == "MERGE_EXISTING":  # what is not merged is handed back as it is
            middle = self.rows.get("middle")
            return self.result != 0 and (middle is None or self.result != middle[5])
        return self.result != 0

    @property
    def in_section(self) -> bool:
        """Whether it was made inside a write section of its task."""
        return bool(self.bits & IN_SECTION)

    def contains(self, other: Decision) -> bool:
        """Whether ``other`` was made inside this one."""
        return (
            self.tid == other.tid and self.order != other.order
            and self.entered <= other.entered and other.time <= self.time
        )  # fmt: skip


class Decisions:
    """The decisions of a trace. ``op``: the row of each one's operation, -1: none; columns are ordered by ``index``."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._file = trace.file
        self.header: Mapping[str, Any] = _header(trace.header)
        probes = self.header.get("probes")
        self._functions = [str(probe.get("function", "")) for probe in probes] if isinstance(probes, list) else []
        self._decoded: dict[int, list[Decision]] = {}
        self._batch: Array
        self.columns = self._load()
        self.section = self._sections()
        self.op = self._operations()
        order = np.argsort(self.op, kind="stable")
        self._by_op = order[np.searchsorted(self.op[order], 0) :]

    @property
    def present(self) -> bool:
        """Whether the trace has this layer."""
        return "decisions" in self._trace.header.get("layers", ())

    def __len__(self) -> int:
        return len(self.columns["index"])

    def __iter__(self) -> Iterator[Decision]:
        return map(self.decision, range(len(self)))

    def of(self, row: int) -> list[Decision]:
        """The decisions of the operation in row ``row``, in the order in which they were made."""
        if not len(self._by_op):
            return []
        ops = self._ops
        lo, hi = np.searchsorted(ops, (row, row + 1))
        found = [self.decision(number) for number in self._by_op[lo:hi].tolist()]
        return sorted(found, key=lambda each: (each.entered, each.order))

    @cached_property
    def _ops(self) -> Array:
        found: Array = self.op[self._by_op]
        return found

    def decision(self, number: int) -> Decision:
        """Decision ``number`` in the order of ``index``."""
        row = int(self._row[number])
        at = int(np.searchsorted(self._batch, row, side="right")) - 1
        batch = self._decoded.get(at)
        if batch is None:
            tables = self._file.batch(at)
            if tables is None:
                raise RuntimeError("the trace changed while it was read")
            if len(self._decoded) >= _BATCHES:
                del self._decoded[next(iter(self._decoded))]
            machine = self._file.header.get("machine")
            batch = self._decoded[at] = _decode(tables["decisions"], self._functions, machine)
        return batch[row - int(self._batch[at])]

    @cached_property
    def lost(self) -> frozenset[tuple[int, int]]:
        """Address spaces and sections (``seq``) in which a decision is missing: ``order`` has a gap there."""
        space, order, seq = (self.columns[name].astype(np.int64) for name in ("space", "order", "seq"))
        sort = np.lexsort((order, space))
        space, order, seq = space[sort], order[sort], seq[sort]
        # Space 0: an exec's new address space, before it is known.
        gap = (space[1:] == space[:-1]) & (order[1:] > order[:-1] + 1) & (space[1:] != 0)
        found = set()
        for at in np.flatnonzero(gap).tolist():
            lo, hi = sorted((int(seq[at]), int(seq[at + 1])))
            found |= {(int(space[at]), number) for number in range(lo, hi + 1)}
        return frozenset(found)

    def missing(self, *kinds: str) -> list[str]:
        """The functions that were to be probed for these kinds and could not be, as the header names them."""
        rows = self.header.get("missing")
        found = []
        for row in rows if isinstance(rows, list) else ():
            what = row.get("what", ())
            if not kinds or not set(kinds).isdisjoint([what] if isinstance(what, str) else what):
                found.append(str(row.get("function", "")))
        return found

    def sees(self, kind: str) -> bool:
        """Whether some probe tells decisions of that kind."""
        probes = self.header.get("probes")
        found = probes if isinstance(probes, list) else ()
        # vma_merge decides on new and on existing ranges.
        both = kind in ("MERGE_NEW", "MERGE_EXISTING")
        return any(probe.get("what") == kind or (both and probe.get("function") == "vma_merge") for probe in found)

    # ---- reading ----

    def _load(self) -> dict[str, Array]:
        counts, parts = [0], {name: [np.zeros(0, dtype)] for name, dtype in _KEPT}
        if self.present:
            for tables in self._file.batches():
                table = tables["decisions"]
                counts.append(table.rows)
                for name, dtype in _KEPT:
                    parts[name].append(table[name].astype(dtype))
        columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self._batch = np.cumsum(counts)
        self._row = np.argsort(columns["index"], kind="stable")
        return {name: values[self._row] for name, values in columns.items()}

    def _sections(self) -> Array:
        """The write section that each decision was made in, -1: none."""
        found = np.full(len(self), -1, np.int64)
        sections = self._trace.records.sections
        if not len(found) or not len(sections["index"]):
            return found
        real = np.flatnonzero(~is_snapshot(sections, slice(None)))
        key = _key(sections["space"][real], sections["seq"][real])
        order = np.argsort(key, kind="stable")
        key, real = key[order], real[order]
        wanted = _key(self.columns["space"], self.columns["seq"])
        at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        # An unmap is completed with the lock downgraded, when its section is over.
        inside = (self.columns["bits"] & IN_SECTION != 0) | (self.columns["what"] == _UNMAP_COMPLETE)
        fits = (key[at] == wanted) & inside
        fits &= sections["tid"][real[at]] == self.columns["tid"]
        return np.where(fits, real[at], found)

    def _operations(self) -> Array:
        """The operation of each decision's write section. (Outside of one nothing but faults makes any.)"""
        of_section = self._trace.operations.of_section
        if not len(of_section):
            return self.section
        found: Array = np.where(self.section >= 0, of_section[self.section], -1)
        return found


def _key(space: Array, seq: Array) -> Array:
    found: Array = space.astype(np.uint64) << np.uint64(32) | seq.astype(np.uint64)
    return found


def _header(header: Mapping[str, Any]) -> Mapping[str, Any]:
    found = header.get("decisions")
    return found if isinstance(found, dict) else {}


def _decode(table: Table, functions: list[str], machine: str | None) -> list[Decision]:
    """The decisions of one batch."""
    columns = [_flags(table, name, machine).tolist() for name in _NUMBERS]
    names, bits, delta = table.text("name"), table["bits"].tolist(), table["delta"].tolist()
    (rows, offsets), descs = _rows(table, machine), _descriptors(table, machine)
    found = []
    for at, values in enumerate(zip(*columns, strict=True)):
        what, probe = _NAMES.get(values[6], str(values[6])), values[7]
        function = functions[probe] if probe < len(functions) else ""
        rest = (names[at], bits[at], delta[at], rows[at], offsets[at], descs[at])
        found.append(Decision._make((*values[:6], what, function, *values[8:], *rest)))
    return found


def _flags(table: Table, name: str, machine: str | None) -> Array:
    return common_flags(table[name], machine) if name == "flags" else table[name]


def _rows(table: Table, machine: str | None) -> tuple[list[dict[str, Row]], list[dict[str, int]]]:
    """The VMAs of each decision by role, and their second page offsets."""
    child, places = table.child("rows"), list(pairwise(table.offsets("rows").tolist()))
    columns = (_flags(child, name, machine).tolist() for name in _VMA)
    values: list[Row] = list(zip(*columns, child.text("name"), strict=True))
    seconds = child["anon_pgoff"].tolist()
    roles = [_ROLES.get(role, str(role)) for role in child["role"].tolist()]
    rows = [dict(zip(roles[lo:hi], values[lo:hi], strict=True)) for lo, hi in places]
    return rows, [dict(zip(roles[lo:hi], seconds[lo:hi], strict=True)) for lo, hi in places]


def _descriptors(table: Table, machine: str | None) -> list[tuple[Descriptor, ...]]:
    child, offsets = table.child("descs"), table.offsets("descs").tolist()
    columns = [_flags(child, name, machine).tolist() for name in _DESCRIPTOR]
    values = [Descriptor(*row) for row in zip(*columns, child.text("ops"), child.text("hook"), strict=True)]
    return [tuple(values[lo:hi]) for lo, hi in pairwise(offsets)]
