"""Rewrites a trace with pyarrow, one field of one record altered: what the tests of verdicts work with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vmatrace.ingest import Trace
from vmatrace.replay import ReplayResult, Verdict, run
from vmatrace.schema import ROW_TABLES, TABLES, Field

JUDGED_TABLES = ("sections", "calls", "tasks")


@dataclass(frozen=True, slots=True)
class Place:
    """One field of one record: ``list`` and ``row`` say which row of a nested table, if it is in one."""

    batch: int
    table: str
    record: int
    field: str
    list: str = ""
    row: int = 0

    @property
    def name(self) -> str:
        """The field as the schema writes it."""
        return ".".join(part for part in (self.table, self.list, self.field) if part)


class Alterable:
    """A trace as Python values that can be changed and written again."""

    def __init__(self, path: Path) -> None:
        with pa.ipc.open_stream(path) as stream:
            self.schema = stream.schema
            self.batches: list[dict[str, Any]] = [batch.to_pylist()[0] for batch in stream]
        self.trace = Trace(path)
        self.result = run(self.trace)
        self.operations = self._operations()

    def _operations(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(table, index of a record) -> (address space, number) of the operation that it belongs to."""
        table, records = self.trace.operations, self.trace.records
        found = {}
        for row in range(len(table)):
            who = (int(table.space[row]), int(table.number[row]))
            for section in table.sections[table.first[row] : table.first[row + 1]].tolist():
                found["sections", int(records.sections["index"][section])] = who
            if table.call[row] >= 0:
                found["calls", int(records.calls["index"][table.call[row]])] = who
            if table.task[row] >= 0:
                found["tasks", int(records.tasks[table.task[row]]["index"])] = who
        return found

    def operation_of(self, place: Place) -> tuple[int, int] | None:
        """The operation that a record belongs to."""
        record = self.batches[place.batch][place.table][place.record]
        return self.operations.get((place.table, record["index"]))

    def places(self, role: str) -> Iterator[Place]:
        """Every field of that role in every record that belongs to an operation."""
        for number, batch in enumerate(self.batches):
            for table in JUDGED_TABLES:
                for at, record in enumerate(batch[table]):
                    if (table, record["index"]) in self.operations:
                        yield from _places(number, table, at, record, role)

    def altered(self, place: Place, value: Any, target: Path) -> ReplayResult:
        """Replay the trace with one value changed, which is put back afterwards."""
        row = self.batches[place.batch][place.table][place.record]
        if place.list:
            row = row[place.list][place.row]
        kept = row[place.field]
        row[place.field] = value
        try:
            self.write(target)
        finally:
            row[place.field] = kept
        return run(target)

    def write(self, target: Path) -> None:
        """Write the trace as it is now."""
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, self.schema) as stream:
            for batch in self.batches:
                stream.write_batch(pa.RecordBatch.from_pylist([batch], schema=self.schema))

    def value(self, place: Place) -> Any:
        """What stands there."""
        row = self.batches[place.batch][place.table][place.record]
        return (row[place.list][place.row] if place.list else row)[place.field]


def _places(batch: int, table: str, at: int, record: dict[str, Any], role: str) -> Iterator[Place]:
    for field in TABLES[table]:
        nested = ROW_TABLES.get(field.type[5:-1]) if field.type.startswith("list<") else None
        if nested is None:
            if field.role == role:
                yield Place(batch, table, at, field.name)
            continue
        for row in range(len(record[field.name])):
            for inner in nested:
                if inner.role == role:
                    yield Place(batch, table, at, inner.name, field.name, row)


def field_of(place: Place) -> Field:
    """The schema's field."""
    fields = TABLES[place.table]
    if place.list:
        outer = next(field for field in fields if field.name == place.list)
        fields = ROW_TABLES[outer.type[5:-1]]
    return next(field for field in fields if field.name == place.field)


def other_value(place: Place, value: Any) -> Any:
    """Another value of the field's type, such as a kernel could have written."""
    if isinstance(value, str):
        return value + "x"
    if place.field in ("start", "end", "brk"):
        return value + 4096
    if place.field == "flags":
        return value ^ 1
    if place.field == "bits":
        return value ^ 2
    if place.field == "result":
        return value + 4096 if abs(value) >= 4096 else -value if value else 1
    if place.field == "what":
        return value % 5 + 1
    return value + 1 if value < 2**31 else value ^ 2


def verdict_of(result: ReplayResult, operation: tuple[int, int]) -> Verdict | None:
    """The verdict of an operation."""
    return next((v for v in result.verdicts if (v.space, v.op) == operation), None)
