"""Cells from the ring buffer -> columns for the trace file, with kernel pointers made opaque.

Everything is done on whole arrays; only records cut in parts, files and losses are handled one by one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vmatrace.capture.ring import FILE_CELLS, Places, Words
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


@dataclass(slots=True)
class _Parts:
    """The parts so far of the write section number ``seq`` of an address space."""

    seq: int
    bodies: list[Words]


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

    def decode(self, words: Words, heads: Places) -> dict[str, Columns]:
        """Tables of all records in ``words``; a write section cut in parts appears with its last part."""
        index = np.arange(2 * self.records + 2, 2 * (self.records + len(heads)) + 2, 2, dtype=np.uint64)
        self.records += len(heads)
        word1 = _take(words, 1, heads)
        kind = word1.astype(np.uint8)
        in_section = _any_of(kind, "SECTION", "EXEC", "LAST")
        numbers = word1 >> _PART
        parts = None
        if self._parts or bool((in_section & (((word1 >> _BYTE) & _PARTIAL) + numbers != 0)).any()):
            words, heads, index, parts = self._join(words, heads, index, in_section)
            kind = _take(words, 1, heads).astype(np.uint8)
            in_section = _any_of(kind, "SECTION", "EXEC", "LAST")
        decoders: list[tuple[str, Array, Callable[[Words, Places, Array], Columns]]] = [
            ("sections", in_section, partial(self._sections, files=heads[kind == KINDS["FILE"]])),
            ("calls", kind == KINDS["CALL"], self._calls),
            ("tasks", _any_of(kind, "FORK", "SPACE_END", "TASK_EXIT"), _tasks),
            ("faults", kind == KINDS["ANON_VMA"], _faults),
            ("files", kind == KINDS["FILE"], self._files),
        ]
        tables = {}
        for name, chosen, decode in decoders:
            places = np.flatnonzero(chosen)
            if len(places):
                tables[name] = decode(words, heads[places], index[places])
                if name == "sections":
                    tables[name]["parts"] = np.ones(len(places), dtype=np.uint16) if parts is None else parts[places]
        return tables

    def _join(
        self, words: Words, heads: Places, index: Array, in_section: Array
    ) -> tuple[Words, Places, Array, Array]:
        """Put the earlier parts of write sections in front of their last part's cells."""
        pieces: list[Words] = []
        kept: list[int] = []
        parts: list[int] = []
        ends = [*heads[1:].tolist(), words.shape[1]]
        for at, (head, end) in enumerate(zip(heads.tolist(), ends, strict=True)):
            body, count = words[:, head:end], 1
            if in_section[at]:
                whole = self._add_part(body)
                if whole is None:
                    continue
                body, count = whole
            parts.append(count)
            pieces.append(body)
            kept.append(at)
        joined = np.concatenate(pieces, axis=1) if pieces else words[:, :0]
        heads = np.cumsum([0, *(piece.shape[1] for piece in pieces)])[:-1].astype(np.int64)
        return joined, heads, index[kept], np.array(parts, dtype=np.uint16)

    def _add_part(self, body: Words) -> tuple[Words, int] | None:
        """The whole section and the number of its parts, once ``body`` is the last and none is missing."""
        word1, word3 = int(body[1, 0]), int(body[3, 0])
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
        cells = [body[:, :1], *(part[:, 1:] for part in bodies), body[:, 1:]]
        return np.concatenate(cells, axis=1), len(bodies) + 1

    def _sections(self, words: Array, heads: Array, index: Array, *, files: Places) -> Columns:
        """The write sections, their rows, covers and evidence as nested lists."""
        many = len(heads)
        tag = words[0].astype(np.uint8)
        tag[heads] = 0
        for place in files.tolist():  # text must not be taken for tags
            tag[place : place + FILE_CELLS] = 0
        is_head = np.zeros(len(tag), dtype=np.int32)
        is_head[heads] = 1
        owner = np.cumsum(is_head) - 1
        wanted = ("BEFORE", "AFTER", "COVER", "EVIDENCE")
        found = {name: np.flatnonzero(tag == CELLS[f"CELL_{name}"]) for name in wanted}
        cover_role = (_take(words, 0, found["COVER"]) >> _BYTE).astype(np.uint8)
        covers = {name: found["COVER"][cover_role == CELLS[f"CELL_{name}"]] for name in ("BEFORE", "AFTER")}
        word1 = _take(words, 1, heads)
        kind = word1.astype(np.uint8)
        columns = _common(words, heads, index) | {
            "kind": kind,
            "op_class": (word1 >> np.uint64(16)).astype(np.uint8),
            "abi": (word1 >> np.uint64(24)).astype(np.uint8),
            "nr": (word1 >> _HALF).astype(np.uint16),
            "brk": _take(words, 6, heads),
        }
        if (kind == KINDS["EXEC"]).any():
            columns["comm"] = _comms(kind, _take(words, 7, heads))
        edge = _edge_cover(words, covers["BEFORE"], owner, many, last=False)
        for name, word in (("acquired", 3), ("def_flags", 4), ("mm_flags", 5), ("brk_before", 6), ("start_brk", 7)):
            columns[name] = edge(word)
        edge = _edge_cover(words, covers["AFTER"], owner, many, last=True)
        columns["map_count"] = edge(3).astype(np.uint32)
        for name, word in (("total_vm", 4), ("data_vm", 5), ("stack_vm", 6), ("locked_vm", 7)):
            columns[name] = edge(word)
        for name in ("BEFORE", "AFTER"):
            rows, cover = found[name], covers[name]
            columns[name.lower()] = (_offsets(owner[rows], many), self._rows(words, rows))
            columns[f"{name.lower()}_cover"] = (
                _offsets(owner[cover], many),
                {
                    "start": _take(words, 1, cover),
                    "end": _take(words, 2, cover),
                    "flags": (_take(words, 0, cover) >> np.uint64(16)).astype(np.uint8),
                    "rows": (_take(words, 0, cover) >> _HALF).astype(np.uint32),
                },
            )
        columns["evidence"] = self._evidence(words, found["EVIDENCE"], owner, many)
        return columns

    def _rows(self, words: Array, rows: Array) -> Columns:
        """VMA cells at the positions ``rows``, with the attributes of extra cells behind some."""
        many = len(rows)
        bits = (_take(words, 0, rows) >> _HALF).astype(np.uint32)
        pointers = np.empty((3, many), dtype=np.uint64)
        for n in range(3):
            pointers[n] = _take(words, 5 + n, rows)
        pointers = self.cloak(pointers)
        columns: Columns = {
            "start": _take(words, 1, rows),
            "end": _take(words, 2, rows),
            "flags": _take(words, 3, rows),
            "pgoff": _take(words, 4, rows),
            "bits": bits & np.uint32(ROW_BITS["ROW_EXTRA"] - 1),
            "object": pointers[0],
            "anon_vma": pointers[1],
            "file": pointers[2],
        }
        has_extra = np.flatnonzero(bits & np.uint32(ROW_BITS["ROW_EXTRA"]))
        if len(has_extra):
            extra = words[:, np.minimum(rows[has_extra] + 1, words.shape[1] - 1)]
            columns["uffd"] = np.zeros(many, dtype=np.uint64)
            columns["uffd"][has_extra] = self.cloak(extra[1])
            columns["policy"] = np.zeros(many, dtype=np.uint64)
            columns["policy"][has_extra] = extra[2]
            columns["name"] = _texts(many, has_extra, np.ascontiguousarray(extra[3:8].T))
        return columns

    def _evidence(self, words: Array, places: Array, owner: Array, many: int) -> tuple[Array, Columns]:
        """Evidence cells hold one or two events each: laid out in pairs, then the absent halves taken out."""
        tags = _take(words, 0, places)
        what = np.empty((len(places), 2), dtype=np.uint8)
        what[:, 0] = tags >> _BYTE
        what[:, 1] = tags >> np.uint64(16)
        flat = what.reshape(-1)
        there = np.flatnonzero(flat)
        pairs = np.empty((3, len(places), 2), dtype=np.uint64)
        for n in range(3):
            pairs[n, :, 0] = _take(words, 1 + n, places)
            pairs[n, :, 1] = _take(words, 4 + n, places)
        events = [pair.reshape(-1).take(there) for pair in pairs]
        offsets = _offsets(owner[places][there >> 1], many)
        return offsets, {
            "what": flat[there],
            "object": self.cloak(events[0]),
            "start": events[1],
            "end": events[2],
        }

    def _calls(self, words: Words, heads: Places, index: Array) -> Columns:
        word1, file = _take(words, 1, heads), _take(words, 7, heads)
        columns = _common(words, heads, index) | {
            "op_class": (word1 >> np.uint64(16)).astype(np.uint8),
            "abi": (word1 >> np.uint64(24)).astype(np.uint8),
            "nr": (word1 >> _HALF).astype(np.uint16),
            "result": _take(words, 6, heads).view(np.int64),
            **{f"arg{n}": _take(words, 1 + n, heads + 1) for n in range(6)},
        }
        if file.any():
            columns["file"] = self.cloak(file)
        return columns

    def _files(self, words: Words, heads: Places, index: Array) -> Columns:
        paths = []
        for head in heads.tolist():
            body = np.ascontiguousarray(words[:, head : head + FILE_CELLS].T).tobytes()
            used = int(words[1, head]) >> 32
            names = body[72 : 72 + used].split(b"\0")[:-1]
            paths.append(path_of(names, int(words[0, head + 1]) >> 8, int(words[7, head])))
        word5, word6 = _take(words, 5, heads), _take(words, 6, heads)
        return {
            "index": index,
            "time": _take(words, 2, heads),
            "cpu": word5.astype(np.uint16),
            "cpu_seq": (word5 >> np.uint64(16)).astype(np.uint32),
            "file": self.cloak(_take(words, 3, heads)),
            "ino": _take(words, 4, heads),
            "dev": word6.astype(np.uint32),
            "mode": (word6 >> _HALF).astype(np.uint16),
            "fs_magic": _take(words, 7, heads).astype(np.uint32),
            "hooks": (_take(words, 1, heads) >> _BYTE).astype(np.uint8),
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


def _take(words: Words, row: int, places: Array) -> Array:
    """Row ``row`` at ``places``: much quicker than one two-dimensional look-up for several rows."""
    found: Array = words[row].take(places)
    return found


def _any_of(kind: Array, *names: str) -> Array:
    chosen: Array = kind == KINDS[names[0]]
    for name in names[1:]:
        chosen |= kind == KINDS[name]
    return chosen


def _common(words: Array, heads: Array, index: Array) -> Columns:
    """The columns all records share (schema.py: when and who)."""
    word3, word4, word5 = _take(words, 3, heads), _take(words, 4, heads), _take(words, 5, heads)
    return {
        "index": index,
        "time": _take(words, 2, heads),
        "cpu": word5.astype(np.uint16),
        "cpu_seq": (word5 >> np.uint64(16)).astype(np.uint32),
        "space": word3.astype(np.uint32),
        "seq": (word3 >> _HALF).astype(np.uint32),
        "pid": (word4 >> _HALF).astype(np.uint32),
        "tid": word4.astype(np.uint32),
    }


def _faults(words: Array, heads: Array, index: Array) -> Columns:
    return _common(words, heads, index) | {"in_section": _take(words, 6, heads).astype(np.uint8)}


def _tasks(words: Array, heads: Array, index: Array) -> Columns:
    kind, word6 = _take(words, 1, heads).astype(np.uint8), _take(words, 6, heads)
    fork = kind == KINDS["FORK"]
    names = ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm", "def_flags", "brk")
    return _common(words, heads, index) | {
        "kind": kind,
        "parent_space": np.where(fork, word6 & _LOW32, 0),
        "parent_seq": np.where(fork, word6 >> _HALF, 0),
        "parent_tid": np.where(fork, _take(words, 7, heads) & _LOW32, 0),
        "exit_code": np.where(kind == KINDS["TASK_EXIT"], word6, 0),
        **{name: np.where(fork, _take(words, 1 + n, heads + 1), 0) for n, name in enumerate(names)},
    }


def _offsets(owner: Array, many: int) -> Array:
    """List offsets (int32) of children whose parents ``owner`` are in order."""
    out = np.zeros(many + 1, dtype=np.int32)
    np.cumsum(np.bincount(owner, minlength=many), out=out[1:])
    return out


def _edge_cover(words: Array, found: Array, owner: Array, many: int, *, last: bool) -> Callable[[int], Array]:
    """A word of the first or last of each section's cover cells; 0 where it has none."""
    owners = owner[found]
    if len(found) == many and bool((owners == np.arange(many)).all()):
        return lambda word: _take(words, word, found)
    place = np.searchsorted(owners, np.arange(many), side="right" if last else "left") - (1 if last else 0)
    place = np.clip(place, 0, max(len(found) - 1, 0))
    there = owners[place] == np.arange(many) if len(found) else np.zeros(many, dtype=bool)

    def word_of(word: int) -> Array:
        out = np.zeros(many, dtype=np.uint64)
        out[there] = _take(words, word, found[place[there]])
        return out

    return word_of


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
