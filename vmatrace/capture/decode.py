"""Cells from the ring buffer -> columns for the trace file, with kernel pointers made opaque.

Everything is done on whole arrays; only records cut in parts, files and losses are handled one by one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vmatrace.capture.decode_decisions import DecisionDecoder
from vmatrace.capture.ring import FILE_CELLS, Cells, Places
from vmatrace.capture.stacks import UserStacks
from vmatrace.schema import CELLS, KINDS, MISC, ROW_BITS

Column = Any
Columns = dict[str, Column]
Array = npt.NDArray[Any]

_LOW32 = np.uint64(0xFFFFFFFF)
_BYTE = np.uint64(8)
_HALF = np.uint64(32)
_PART = np.uint64(48)
_PARTIAL = np.uint64(MISC["SECTION_PARTIAL"])


class Cloak:
    """A keyed permutation of 64-bit words that keeps 0: the same pointer gives the same id, and none gives it away.

    Rounds of multiply by a secret odd number and shift-xor, each of which maps 0 to 0; the key lives in this
    object alone.
    """

    def __init__(self) -> None:
        self._keys = [np.uint64(secrets.randbits(64) | 1) for _ in range(3)]

    def __call__(self, words: Array) -> Array:
        """Opaque ids of the pointers ``words`` (uint64)."""
        first, second, last = self._keys
        with np.errstate(over="ignore"):
            out = words * first
            out ^= out >> _HALF
            out *= second
            out ^= out >> _HALF
            out *= last
        return out


# Words 3 to 7 of the cells that close a walk: fields of the mm at that moment.
_COVER_WORDS = {
    "BEFORE": ("acquired", "def_flags", "mm_flags", "brk_before", "start_brk"),
    "AFTER": ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm"),
}


@dataclass(slots=True)
class _Parts:
    """The parts so far of the write section number ``seq`` of an address space."""

    seq: int
    bodies: list[Cells]


class Decoder:
    """Turns runs of cells into tables. Keeps the parts of records still incomplete, and the running index.

    ``records``: decoded so far. ``dropped``: of these, parts of write sections that lost another part: such a
    section is lost as a whole.
    """

    def __init__(self, cloak: Cloak) -> None:
        self.cloak = cloak
        self.records = 0
        self.dropped = 0
        self._parts: dict[int, _Parts] = {}
        self._decide: DecisionDecoder | None = None
        #: Numbers the user stacks that calls carry, where they do.
        self.stacks: UserStacks | None = None

    def expect_decisions(self, hooks: Sequence[str]) -> None:
        """Records of the decisions layer will come; ``hooks``: the symbol of each probe that is on a file's hook."""
        self._decide = DecisionDecoder(self.cloak, self._rows, hooks)

    def decode(self, cells: Cells, heads: Places) -> dict[str, Columns]:
        """Tables of all records in ``cells``; a write section cut in parts appears with its last part."""
        index = np.arange(2 * self.records + 2, 2 * (self.records + len(heads)) + 2, 2, dtype=np.uint64)
        self.records += len(heads)
        word1 = cells[heads, 1]
        kind = word1.astype(np.uint8)
        in_section = _any_of(kind, "SECTION", "EXEC", "LAST")
        numbers = word1 >> _PART
        parts = None
        if self._parts or bool((in_section & (((word1 >> _BYTE) & _PARTIAL) + numbers != 0)).any()):
            cells, heads, index, parts = self._join(cells, heads, index, in_section)
            kind = cells[heads, 1].astype(np.uint8)
            in_section = _any_of(kind, "SECTION", "EXEC", "LAST")
        decoders: list[tuple[str, Array, Callable[[Cells, Places, Array], Columns]]] = [
            ("sections", in_section, partial(self._sections, files=heads[kind == KINDS["FILE"]])),
            ("calls", kind == KINDS["CALL"], self._calls),
            ("tasks", _any_of(kind, "FORK", "SPACE_END", "TASK_EXIT"), _tasks),
            ("faults", kind == KINDS["ANON_VMA"], _faults),
            ("files", kind == KINDS["FILE"], self._files),
            ("decisions", kind == KINDS["DECISION"], self._decisions),
        ]
        tables = {}
        for name, chosen, decode in decoders:
            places = np.flatnonzero(chosen)
            if len(places):
                tables[name] = decode(cells, heads[places], index[places])
                if name == "sections":
                    tables[name]["parts"] = np.ones(len(places), dtype=np.uint16) if parts is None else parts[places]
        if self.stacks is not None and "calls" in tables:
            tables |= self.stacks.tables(tables["calls"]["index"], cells[heads[kind == KINDS["CALL"]] + 1, 7])
        return tables

    def _join(self, cells: Cells, heads: Places, index: Array, in_section: Array) -> tuple[Cells, Places, Array, Array]:
        """Put the earlier parts of write sections in front of their last part's cells."""
        pieces: list[Cells] = []
        kept: list[int] = []
        parts: list[int] = []
        ends = [*heads[1:].tolist(), len(cells)]
        for at, (head, end) in enumerate(zip(heads.tolist(), ends, strict=True)):
            body, count = cells[head:end], 1
            if in_section[at]:
                whole = self._add_part(body)
                if whole is None:
                    continue
                body, count = whole
            parts.append(count)
            pieces.append(body)
            kept.append(at)
        joined = np.concatenate(pieces) if pieces else cells[:0]
        heads = np.cumsum([0, *map(len, pieces)])[:-1].astype(np.int64)
        return joined, heads, index[kept], np.array(parts, dtype=np.uint16)

    def _add_part(self, body: Cells) -> tuple[Cells, int] | None:
        """The whole section and the number of its parts, once ``body`` is the last and none is missing."""
        word1, word3 = int(body[0, 1]), int(body[0, 3])
        space, seq, number, more = word3 & 0xFFFFFFFF, word3 >> 32, word1 >> 48, bool(word1 >> 8 & 1)
        earlier = self._parts.pop(space, None)
        if earlier is not None and (earlier.seq != seq or len(earlier.bodies) != number):
            self.dropped += len(earlier.bodies)
            earlier = None
        if number and earlier is None:  # an earlier one was lost
            self.dropped += 1
            return None
        bodies = earlier.bodies if earlier else []
        if more:
            bodies.append(body.copy())
            self._parts[space] = _Parts(seq, bodies)
            return None
        return np.concatenate([body[:1], *(part[1:] for part in bodies), body[1:]]), len(bodies) + 1

    def _sections(self, cells: Cells, heads: Places, index: Array, *, files: Places) -> Columns:
        """The write sections, their rows, covers and evidence as nested lists."""
        many = len(heads)
        tag = cells[:, 0].astype(np.uint8)
        tag[heads] = 0
        for place in files.tolist():  # text must not be taken for tags
            tag[place : place + FILE_CELLS] = 0
        wanted = ("BEFORE", "AFTER", "COVER", "EVIDENCE")
        found = {name: np.flatnonzero(tag == CELLS[f"CELL_{name}"]) for name in wanted}
        is_head = np.zeros(len(tag), dtype=np.int32)
        is_head[heads] = 1
        owner = np.cumsum(is_head, dtype=np.int32) - 1
        head = _columns(cells, heads)
        kind = head[1].astype(np.uint8)
        columns = _common(head, index) | {
            "kind": kind,
            "op_class": (head[1] >> np.uint64(16)).astype(np.uint8),
            "abi": (head[1] >> np.uint64(24)).astype(np.uint8),
            "nr": (head[1] >> _HALF).astype(np.uint16),
            "brk": head[6],
        }
        if (kind == KINDS["EXEC"]).any():
            columns["comm"] = _comms(kind, head[7])
        role = (cells[found["COVER"], 0] >> _BYTE).astype(np.uint8)
        for name, fields in _COVER_WORDS.items():
            rows, covers = found[name], found["COVER"][role == CELLS[f"CELL_{name}"]]
            cover, owners = _columns(cells, covers), owner.take(covers)
            edge = _edge_of(owners, many, last=name == "AFTER")
            columns |= {field: edge(cover[3 + n]) for n, field in enumerate(fields)}
            columns[name.lower()] = (_offsets(owner.take(rows), many), self._rows(cells, rows))
            columns[f"{name.lower()}_cover"] = (
                _offsets(owners, many),
                {
                    "start": cover[1],
                    "end": cover[2],
                    "flags": (cover[0] >> np.uint64(16)).astype(np.uint8),
                    "rows": (cover[0] >> _HALF).astype(np.uint32),
                },
            )
        evidence = found["EVIDENCE"]
        columns["evidence"] = self._evidence(_columns(cells, evidence), owner.take(evidence), many)
        return columns

    def _rows(self, cells: Cells, places: Places) -> Columns:
        """VMA cells at ``places``, with the attributes of extra cells behind some."""
        many = len(places)
        row = _columns(cells, places)
        bits = (row[0] >> _HALF).astype(np.uint32)
        pointers = self.cloak(row[5:8])
        columns: Columns = {
            "start": row[1],
            "end": row[2],
            "flags": row[3],
            "pgoff": row[4],
            "bits": bits & np.uint32(ROW_BITS["ROW_EXTRA"] - 1),
            "object": pointers[0],
            "anon_vma": pointers[1],
            "file": pointers[2],
        }
        has_extra = np.flatnonzero(bits & np.uint32(ROW_BITS["ROW_EXTRA"]))
        if len(has_extra):
            extra = cells[np.minimum(places[has_extra] + 1, len(cells) - 1)]
            columns["uffd"] = np.zeros(many, dtype=np.uint64)
            columns["uffd"][has_extra] = self.cloak(extra[:, 1])
            columns["policy"] = np.zeros(many, dtype=np.uint64)
            columns["policy"][has_extra] = extra[:, 2]
            columns["name"] = _texts(many, has_extra, extra[:, 3:8])
        return columns

    def _evidence(self, cell: Array, owner: Array, many: int) -> tuple[Array, Columns]:
        """Evidence cells hold one or two events each: laid out in pairs, then the absent halves taken out."""
        what = np.empty((cell.shape[1], 2), dtype=np.uint8)
        what[:, 0] = cell[0] >> _BYTE
        what[:, 1] = cell[0] >> np.uint64(16)
        flat = what.reshape(-1)
        there = np.flatnonzero(flat)
        events = [np.stack((cell[1 + n], cell[4 + n]), axis=1).reshape(-1).take(there) for n in range(3)]
        return _offsets(owner.take(there >> 1), many), {
            "what": flat[there],
            "object": self.cloak(events[0]),
            "start": events[1],
            "end": events[2],
        }

    def _calls(self, cells: Cells, heads: Places, index: Array) -> Columns:
        head, body = _columns(cells, heads), _columns(cells, heads + 1)
        columns = _common(head, index) | {
            "op_class": (head[1] >> np.uint64(16)).astype(np.uint8),
            "abi": (head[1] >> np.uint64(24)).astype(np.uint8),
            "nr": (head[1] >> _HALF).astype(np.uint16),
            "result": head[6].view(np.int64),
            **{f"arg{n}": body[1 + n] for n in range(6)},
        }
        if head[7].any():
            columns["file"] = self.cloak(head[7])
        return columns

    def _decisions(self, cells: Cells, heads: Places, index: Array) -> Columns:
        assert self._decide is not None
        return self._decide(cells, heads, _common(_columns(cells, heads), index))

    def _files(self, cells: Cells, heads: Places, index: Array) -> Columns:
        paths = []
        for place in heads.tolist():
            body = cells[place : place + FILE_CELLS].tobytes()
            used = int(cells[place, 1]) >> 32
            names = body[72 : 72 + used].split(b"\0")[:-1]
            paths.append(path_of(names, int(cells[place + 1, 0]) >> 8, int(cells[place, 7])))
        head = _columns(cells, heads)
        return {
            "index": index,
            "time": head[2],
            "cpu": head[5].astype(np.uint16),
            "cpu_seq": (head[5] >> np.uint64(16)).astype(np.uint32),
            "file": self.cloak(head[3]),
            "ino": head[4],
            "dev": head[6].astype(np.uint32),
            "mode": (head[6] >> _HALF).astype(np.uint16),
            "fs_magic": head[7].astype(np.uint32),
            "hooks": (head[1] >> _BYTE).astype(np.uint8),
            "path": paths,
        }


ANON_INODE_FS = 0x09041934


def path_of(names: list[bytes], bits: int, fs_magic: int) -> str:
    """A path from its names, leaf first, as /proc/PID/maps would show it (before escaping).

    ``bits``: 1 the name is unhashed (deleted), 2 its dentry stands alone and names itself (simple_dname() and
    anon_inodefs_dname() in the kernel).
    """
    parts = [name for name in reversed(names) if name and name != b"/"]
    text = b"/" + b"/".join(parts)
    if bits & 2 and fs_magic == ANON_INODE_FS:
        text = b"anon_inode:" + text[1:]
    elif bits:
        text += b" (deleted)"
    return text.decode("utf-8", "backslashreplace")


def _columns(cells: Cells, places: Places) -> Array:
    """The cells at ``places`` as eight contiguous columns. Each cell, a cache line, is fetched once."""
    return np.ascontiguousarray(cells.take(places, axis=0).T)


def _any_of(kind: Array, *names: str) -> Array:
    chosen: Array = kind == KINDS[names[0]]
    for name in names[1:]:
        chosen |= kind == KINDS[name]
    return chosen


def _common(head: Array, index: Array) -> Columns:
    """The columns all records share (schema.py: when and who), from their head cells' columns."""
    return {
        "index": index,
        "time": head[2],
        "cpu": head[5].astype(np.uint16),
        "cpu_seq": (head[5] >> np.uint64(16)).astype(np.uint32),
        "space": head[3].astype(np.uint32),
        "seq": (head[3] >> _HALF).astype(np.uint32),
        "pid": (head[4] >> _HALF).astype(np.uint32),
        "tid": head[4].astype(np.uint32),
    }


def _faults(cells: Cells, heads: Places, index: Array) -> Columns:
    head = _columns(cells, heads)
    return _common(head, index) | {"in_section": head[6].astype(np.uint8)}


def _tasks(cells: Cells, heads: Places, index: Array) -> Columns:
    head, body = _columns(cells, heads), _columns(cells, heads + 1)
    kind = head[1].astype(np.uint8)
    fork = kind == KINDS["FORK"]
    names = ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm", "def_flags", "brk")
    return _common(head, index) | {
        "kind": kind,
        "parent_space": np.where(fork, head[6] & _LOW32, 0),
        "parent_seq": np.where(fork, head[6] >> _HALF, 0),
        "parent_tid": np.where(fork, head[7] & _LOW32, 0),
        "exit_code": np.where(kind == KINDS["TASK_EXIT"], head[6], 0),
        **{name: np.where(fork, body[1 + n], 0) for n, name in enumerate(names)},
    }


def _offsets(owner: Array, many: int) -> Array:
    """List offsets (int32) of children whose parents ``owner`` are in order."""
    out = np.zeros(many + 1, dtype=np.int32)
    np.cumsum(np.bincount(owner, minlength=many), out=out[1:])
    return out


def _edge_of(owners: Array, many: int, *, last: bool) -> Callable[[Array], Array]:
    """Picks of a column of cover cells the first or last of each of ``many`` sections; 0 where it has none."""
    sections = np.arange(many)
    if len(owners) == many and bool((owners == sections).all()):
        return lambda column: column
    place = np.searchsorted(owners, sections, side="right" if last else "left") - (1 if last else 0)
    place = np.clip(place, 0, max(len(owners) - 1, 0))
    there = owners[place] == sections if len(owners) else np.zeros(many, dtype=bool)

    def pick(column: Array) -> Array:
        out = np.zeros(many, dtype=np.uint64)
        out[there] = column[place[there]]
        return out

    return pick


def _comms(kind: Array, arg: Array) -> list[str]:
    """The first 8 bytes of the task's name for EXEC sections, empty for others."""
    execs = np.flatnonzero(kind == KINDS["EXEC"])
    return _texts(len(kind), execs, arg[execs].reshape(-1, 1))


def _texts(many: int, places: Array, rows: Array) -> list[str]:
    """NUL-ended text held in rows of words, put at ``places`` of ``many`` texts."""
    texts = [""] * many
    for place, row in zip(places.tolist(), rows, strict=True):
        texts[place] = row.tobytes().split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    return texts
