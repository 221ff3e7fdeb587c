"""Writes trace files, batch by batch, so that what was written stays readable whatever happens next."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from vmatrace.errors import CannotTrace, UsageError
from vmatrace.schema import ROW_TABLES, Field
from vmatrace.tracefile.layout import ARROW_TYPES, END_FIELDS, arrow_field, arrow_schema, arrow_type, element, tables_of

Columns = Mapping[str, Any]

_WRITE_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_IOV_MAX: Final = 512
_PIECE: Final = 1 << 20
# pyarrow would import pandas to tell these, and for any list or array given to pa.array.
_DTYPES: Final = {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "i64": np.int64}


class TraceWriter:
    """A trace file that is being written, batch by batch, each handed to the kernel at once.

    The file is created for its owner alone (the user behind sudo) and never overwritten without ``force``.
    A failing write cuts the file back to its last complete batch and raises CannotTrace.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any], force: bool = False) -> None:
        self.path = Path(path)
        self.bytes_written = 0
        self._tables = tables_of(header.get("layers", ()))
        self._schema = arrow_schema(header)
        self._parts: list[Any] = []
        self._fd = _create(self.path, force)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        # Arrow holds its schema message back until the first batch; the header must be there at once.
        head = self._schema.serialize()
        self._skip = len(head)
        self._write_out([head])
        # Arrow writes hundreds of small pieces a batch: gathered on its side, they come as few.
        self._gathered = pa.BufferedOutputStream(pa.PythonFile(_Collector(self._parts), "w"), _PIECE)
        self._stream = pa.ipc.new_stream(self._gathered, self._schema, options=_WRITE_OPTIONS)
        self._empty = {name: _one_row(_struct(fields, {})) for name, fields in self._all_tables()}

    def write(self, tables: Mapping[str, Columns]) -> None:
        """Write one batch: table name -> column name -> values; what is missing is empty, or zeros.

        A column is a NumPy array, text a list of str or an Arrow array, and a list column a pair
        ``(offsets, columns of its elements)`` with one offset more than the table has rows.
        """
        unknown = tables.keys() - self._tables.keys()
        if unknown:
            raise ValueError(f"no such tables: {sorted(unknown)}")
        self._put({name: _one_row(_struct(self._tables[name], columns)) for name, columns in tables.items()})

    def finish(self, end: Mapping[str, Any]) -> None:
        """Write the end mark (keys of ``END_FIELDS``) and close: the trace is complete."""
        columns = {name: _end_column(value) for name, value in end.items()}
        self._put({"end": _one_row(_struct(END_FIELDS, columns, rows=1))})
        self._stream.close()
        self._flush()
        self.close()

    def close(self) -> None:
        """Close the file as it is; without an end mark the trace counts as cut."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def disk(self) -> tuple[int, int] | None:
        """Bytes free and in all on the file's disk; None for a pipe or a device."""
        if self._fd < 0 or not self._regular:
            return None
        found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all_tables(self) -> list[tuple[str, Sequence[Field]]]:
        return [*self._tables.items(), ("end", END_FIELDS)]

    def _put(self, arrays: dict[str, pa.Array]) -> None:
        """One batch of the given tables; the others have no rows in it."""
        columns = list({**self._empty, **arrays}.values())
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._flush()

    def _flush(self) -> None:
        self._gathered.flush()
        parts = [memoryview(part).cast("B") for part in self._parts]
        self._parts.clear()
        while self._skip:
            length = len(parts[0])
            parts[0] = parts[0][self._skip :]
            self._skip -= length - len(parts[0])
            if not parts[0]:
                parts.pop(0)
        self._write_out(parts)

    def _write_out(self, parts: Sequence[Any]) -> None:
        size = 0
        if self._fd < 0:
            raise CannotTrace(f"cannot write {self.path}: the trace is closed already")
        try:
            for at in range(0, len(parts), _IOV_MAX):
                size += _write_all(self._fd, parts[at : at + _IOV_MAX])
        except OSError as error:
            self._give_up(error)
        self.bytes_written += size

    def _give_up(self, error: OSError) -> None:
        try:
            os.ftruncate(self._fd, self.bytes_written)
        except OSError:
            pass  # a pipe or a device; a reader stops at the last complete batch anyway
        finally:
            self.close()
        hint = "free some space, or write elsewhere with -o" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise CannotTrace(
            f"cannot write {self.path}: {error.strerror}; what is there stays readable",
            hint,
        ) from error


class _Collector:
    """The file that Arrow writes to: keeps the pieces of one batch until they are written together."""

    closed = False

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def write(self, data: Any) -> int:
        self._parts.append(data)
        return len(data)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _write_all(fd: int, parts: Sequence[Any]) -> int:
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    total = sum(len(view) for view in views)
    left = total
    while left:
        done = os.writev(fd, views)
        left -= done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]
    return total


def _create(path: Path, force: bool) -> int:
    """Open a new file for a trace; devices and pipes are taken as they are."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        if mode and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            return os.open(path, flags | os.O_NOFOLLOW)
        if mode and not force:
            raise UsageError(f"{path} exists already", "choose another name with -o, or add --force")
        if mode and not stat.S_ISDIR(mode):
            os.unlink(path)  # never written through a link, never under another owner
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        _give_to_sudo_user(fd)
        return fd
    except FileNotFoundError as error:
        raise UsageError(
            f"cannot write {path}: no such directory", "create it first, or choose another with -o"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another place with -o") from error


def _give_to_sudo_user(fd: int) -> None:
    uid, gid = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_GID", "")
    if os.geteuid() == 0 and uid.isdecimal() and gid.isdecimal():
        try:
            os.fchown(fd, int(uid), int(gid))
        except OSError:
            return  # a file system without owners


def _one_row(struct: pa.Array) -> pa.Array:
    offsets = _offsets(np.array([0, len(struct)], dtype=np.int32))
    item = pa.field("item", struct.type, nullable=False)
    return pa.ListArray.from_arrays(offsets, struct, type=pa.list_(item))


def _struct(fields: Sequence[Field], columns: Columns, rows: int | None = None) -> pa.Array:
    unknown = columns.keys() - {field.name for field in fields}
    if unknown:
        raise ValueError(f"no such columns: {sorted(unknown)}")
    if rows is None:
        rows = max((_rows_of(value) for value in columns.values()), default=0)
    arrays = [_column(field, columns.get(field.name), rows) for field in fields]
    return pa.StructArray.from_arrays(arrays, fields=[arrow_field(field) for field in fields])


def _rows_of(value: Any) -> int:
    return len(value[0]) - 1 if isinstance(value, tuple) else len(value)


def _column(field: Field, value: Any, rows: int) -> pa.Array:
    inner = element(field)
    if inner is not None:
        offsets, elements = value if value is not None else (np.zeros(rows + 1, dtype=np.int32), None)
        offsets = np.ascontiguousarray(offsets, dtype=np.int32)
        if inner in ROW_TABLES:
            child = _struct(ROW_TABLES[inner], elements or {}, rows=int(offsets[-1]))
        else:
            child = _numbers(inner, elements, int(offsets[-1]))
        item = arrow_type(field)
        return pa.ListArray.from_arrays(_offsets(offsets), child, type=item)
    if field.type == "text":
        return _texts(value, rows)
    return _numbers(field.type, value, rows)


def _offsets(values: Any) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _numbers(type_name: str, value: Any, rows: int) -> pa.Array:
    kind = ARROW_TYPES[type_name]
    dtype = _DTYPES[type_name]
    data = np.zeros(rows, dtype) if value is None else np.ascontiguousarray(value, dtype=dtype)
    if len(data) != rows:
        raise ValueError(f"a column of {len(data)} values in a table of {rows} rows")
    return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(data)])


def _texts(value: Any, rows: int) -> pa.Array:
    if value is None:
        zeros = pa.py_buffer(bytes(4 * (rows + 1)))
        return pa.Array.from_buffers(pa.string(), rows, [None, zeros, pa.py_buffer(b"")])
    array = value if isinstance(value, pa.Array) else _encoded(value)
    if len(array) != rows:
        raise ValueError(f"a column of {len(array)} texts in a table of {rows} rows")
    return array if array.type == pa.string() else array.cast(pa.string())


def _encoded(texts: Sequence[str]) -> pa.Array:
    data = [_clean(text).encode() for text in texts]
    ends = np.zeros(len(data) + 1, np.int32)
    np.cumsum([len(item) for item in data], out=ends[1:])
    return pa.Array.from_buffers(pa.string(), len(data), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(data))])


def _clean(text: str) -> str:
    """The text with what is no valid Unicode as ``\\xNN``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _end_column(value: Any) -> Any:
    if isinstance(value, str | int):
        return [value]
    values = list(value)
    return np.array([0, len(values)], dtype=np.int32), np.array(values, dtype=np.uint32)
