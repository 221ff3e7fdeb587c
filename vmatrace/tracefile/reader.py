"""Reads trace files: a cut or damaged one up to its last good batch, anything else not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmatrace.errors import BadTrace
from vmatrace.schema import LAYER_TABLES, SCHEMA_VERSION, TABLES
from vmatrace.tracefile.layout import END_FIELDS, METADATA_KEY, arrow_schema, element

Array = npt.NDArray[Any]

# A stream's first message is its schema; one without it, or with a longer one, is not ours.
_SCHEMA_LIMIT: Final = 16 << 20


class Table:
    """One table of one batch as NumPy columns; a list column is ``offsets(name)`` and ``child(name)``."""

    __slots__ = ("_array", "_cache", "rows")

    def __init__(self, array: pa.StructArray) -> None:
        self._array = array
        self._cache: dict[str, Any] = {}
        self.rows = len(array)

    def __getitem__(self, name: str) -> Array:
        """A column of numbers; zeros where the trace is older than the column."""
        found: Array | None = self._cache.get(name)
        if found is None:
            if name in self:
                found = self._array.field(name).to_numpy(zero_copy_only=False)
            else:
                found = np.zeros(self.rows, np.uint64)
            self._cache[name] = found
        return found

    def __contains__(self, name: str) -> bool:
        return bool(self._array.type.get_field_index(name) >= 0)

    def text(self, name: str) -> list[str]:
        """A column of texts."""
        found: list[str] | None = self._cache.get(name)
        if found is None:
            found = self._cache[name] = self._array.field(name).to_pylist()
        return found

    def has_text(self, name: str) -> bool:
        """Whether any text of the column is not empty (cheap)."""
        column = self._array.field(name)
        if not len(column):
            return False
        offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
        return bool(offsets[-1] > offsets[0])

    def offsets(self, name: str) -> Array:
        """Where each row's elements begin in ``child(name)``, and the end: one more than rows."""
        key = name + "[]"
        found: Array | None = self._cache.get(key)
        if found is None:
            found = _list_offsets(self._array.field(name))
            found = self._cache[key] = found - found[0]
        return found

    def child(self, name: str) -> Table:
        """The elements of a list column, of all rows."""
        found: Table | None = self._cache.get(name)
        if found is None:
            found = self._cache[name] = Table(_elements(self._array.field(name)))
        return found

    def numbers(self, name: str) -> Array:
        """The elements of a list of numbers, of all rows."""
        values: Array = _elements(self._array.field(name)).to_numpy(zero_copy_only=False)
        return values


class TraceFile:
    """A trace file opened for reading: its header, and its batches, decoded when asked for.

    ``complete`` is False where the end mark is missing; ``warning`` then says where the file stops. ``end``
    holds the end mark as a dict, empty without one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        self._size = os.fstat(self._file.fileno()).st_size
        self._schema, position = self._read_schema()
        self.header: dict[str, Any] = _header_of(self._schema, self.path)
        self._places: list[tuple[int, int]] = []
        self._position: int | None = position
        self.complete = False
        self.warning = ""
        self.end: dict[str, Any] = {}

    def batches(self) -> Iterator[dict[str, Table]]:
        """All complete batches in order; after the last, ``complete``, ``warning`` and ``end`` are known."""
        number = 0
        while number < len(self._places) or self._find_next():
            tables = self._decode(number)
            if tables is None:
                return
            yield tables
            del tables
            number += 1

    def batch(self, number: int) -> dict[str, Table] | None:
        """One batch that ``batches`` has passed already, None where it is damaged."""
        return self._decode(number)

    def close(self) -> None:
        """Close the file; decoded batches stay valid."""
        self._file.close()

    def _read_schema(self) -> tuple[pa.Schema, int]:
        start = _frame(self._file, 0, self._size)
        if start is None or start[0] > _SCHEMA_LIMIT:
            raise _not_a_trace(self.path, "it does not begin with an Arrow schema")
        self._file.seek(0)
        data = self._file.read(start[0])
        try:
            schema = pa.ipc.read_schema(pa.py_buffer(data))
        except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
            raise _not_a_trace(self.path, "its first message is no Arrow schema") from error
        return schema, start[0]

    def _find_next(self) -> bool:
        """Find the frame of the next message; False at the end of the file or where it is cut."""
        if self._position is None:
            return False
        frame = _frame(self._file, self._position, self._size)
        if frame is None:
            self._stop(f"the trace ends early, after {len(self._places)} complete batches")
            return False
        length, is_end = frame
        if is_end:
            self._stop("" if self.end else "the trace has no end mark")
            return False
        self._places.append((self._position, length))
        self._position += length
        return True

    def _stop(self, warning: str) -> None:
        self._position = None
        self.complete = bool(self.end) and not warning
        self.warning = warning

    def _decode(self, number: int) -> dict[str, Table] | None:
        offset, length = self._places[number]
        self._file.seek(offset)
        data = self._file.read(length)
        try:
            tables = _tables(pa.py_buffer(data), self._schema)
        except (pa.ArrowException, ValueError, KeyError, OSError, MemoryError, OverflowError) as error:
            del self._places[number:]
            self.end = {}
            self._stop(f"the trace is damaged at byte {offset}: {_first_line(error)}")
            return None
        if tables["end"].rows:
            self.end = _end_mark(tables["end"])
        return tables


def _open(path: Path) -> IO[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a directory" if path.is_dir() else "no regular file"
            raise _not_a_trace(path, f"it is {kind}")
        return open(path, "rb", buffering=0)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "give the file that `vmatrace record` wrote"
        if isinstance(error, PermissionError):
            hint = "a trace is its owner's alone: read it as that user, or with sudo"
        raise BadTrace(f"cannot read {path}: {reason}", hint) from error


def _frame(file: IO[bytes], position: int, size: int) -> tuple[int, bool] | None:
    """The length of the message at ``position`` and whether it ends the stream; None where it is cut."""
    file.seek(position)
    head = file.read(8)
    if len(head) < 8 or head[:4] != b"\xff\xff\xff\xff":
        return None
    meta = int.from_bytes(head[4:], "little")
    if meta == 0:
        return 8, True
    if meta > size - position - 8:
        return None
    body = _body_length(file.read(meta))
    if body is None or not 0 <= body <= size - position - 8 - meta:
        return None
    return 8 + meta + body, False


def _body_length(meta: bytes) -> int | None:
    """``bodyLength`` of an Arrow message: its flatbuffer's fourth field, absent: 0; None where malformed."""

    def number(at: int, size: int) -> int:
        if at < 0 or at + size > len(meta):
            raise IndexError(at)
        return int.from_bytes(meta[at : at + size], "little", signed=True)

    try:
        table = number(0, 4)
        vtable = table - number(table, 4)
        if number(vtable, 2) < 12:
            return 0
        place = number(vtable + 10, 2)
        return number(table + place, 8) if place else 0
    except IndexError:
        return None


def _tables(data: pa.Buffer, schema: pa.Schema) -> dict[str, Table]:
    message = pa.ipc.read_message(data)
    if message.type != "record batch":
        raise ValueError(f"a message of type {message.type}")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    tables = {}
    for name in (*TABLES, "end"):
        at = schema.get_field_index(name)
        if at < 0:  # of a layer that the trace has not
            tables[name] = _empty(name)
            continue
        column = batch.column(at)
        if _has_nulls(column):
            raise ValueError(f"null values in {name}")
        tables[name] = Table(_elements(column))
    return tables


def _list_offsets(array: pa.ListArray) -> Array:
    """Where each row's elements begin, and the end; the one offset of no rows at all is not looked at."""
    if not len(array):
        return np.zeros(1, np.int32)
    offsets: Array = array.offsets.to_numpy()
    return offsets


def _elements(array: pa.ListArray) -> pa.Array:
    """The elements of all rows. (Arrow's own flatten aborts the process on offsets of no rows.)"""
    offsets = _list_offsets(array)
    first, last = int(offsets[0]), int(offsets[-1])
    if not 0 <= first <= last <= len(array.values):
        raise ValueError("a list points outside its elements")
    return array.values.slice(first, last - first)


def _has_nulls(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if pa.types.is_list(array.type):
        return _has_nulls(_elements(array))
    if pa.types.is_struct(array.type):
        return any(_has_nulls(array.field(i)) for i in range(array.type.num_fields))
    return False


def _end_mark(table: Table) -> dict[str, Any]:
    mark: dict[str, Any] = {}
    for field in END_FIELDS:
        if element(field) is not None:
            mark[field.name] = table.numbers(field.name).tolist()
        else:
            mark[field.name] = table.text(field.name)[0] if field.type == "text" else int(table[field.name][0])
    return mark


def _header_of(schema: pa.Schema, path: Path) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise _not_a_trace(path, "it is an Arrow stream of something else")
    try:
        header = json.loads(raw)
        version = header["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_a_trace(path, "its header is damaged") from error
    if not isinstance(header, dict) or not isinstance(version, int) or not isinstance(header.get("layers", []), list):
        raise _not_a_trace(path, "its header is damaged")
    if version > SCHEMA_VERSION:
        raise BadTrace(
            f"{path} has trace schema {version}, this vmatrace knows schema {SCHEMA_VERSION}",
            "open it with a newer vmatrace: pip install --upgrade vmatrace",
        )
    layers = header.get("layers", ())
    different = [
        field.name
        for field in _known_schema()
        if not _same(schema, field) and LAYER_TABLES.get(field.name) in (None, *layers)
    ]
    if different:
        raise BadTrace(
            f"{path} says trace schema {version} but its tables differ from schema {SCHEMA_VERSION}: "
            + ", ".join(different),
            "record it again with this vmatrace",
        )
    return header


@cache
def _known_schema() -> pa.Schema:
    return arrow_schema({"layers": tuple(LAYER_TABLES.values())})


@cache
def _empty(name: str) -> Table:
    return Table(pa.array([], _known_schema().field(name).type.value_type))


def _same(schema: pa.Schema, field: pa.Field) -> bool:
    at = schema.get_field_index(field.name)
    return at >= 0 and _same_type(schema.field(at).type, field.type)


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether ``found`` has the columns of ``wanted``, each of its type; numbers that came later may lack."""
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(found)) and _same_type(found.value_type, wanted.value_type)
    if not pa.types.is_struct(wanted):
        return bool(found == wanted)
    if not pa.types.is_struct(found):
        return False
    for field in wanted:
        at = found.get_field_index(field.name)
        if at < 0 and pa.types.is_integer(field.type):
            continue
        if at < 0 or not _same_type(found.field(at).type, field.type):
            return False
    return True


def _not_a_trace(path: Path, why: str) -> BadTrace:
    return BadTrace(f"{path} is not a vmatrace trace: {why}", "give the file that `vmatrace record` wrote")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
