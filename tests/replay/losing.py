"""Takes records out of a trace, as a ring buffer without room loses them: what the tests of losses work with."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

#: The tables whose records come through the ring buffer, each with a number of its CPU.
RECORDED = ("sections", "calls", "tasks", "faults", "files", "decisions")
_NO_CPU = 65535  # looks at living address spaces are made by the recorder itself
#: How records get lost.
WAYS = ("one", "some", "run", "cpu", "table", "first", "last", "forks", "files", "many")

Lost = frozenset[int]


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its ``index`` names it."""

    index: int
    table: str
    cpu: int
    cpu_seq: int
    space: int


class Losable:
    """A trace from which records can be taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.ipc.open_stream(path) as stream:
            self.schema = stream.schema
            self.batches = list(stream)
        self.tables = tuple(name for name in RECORDED if name in self.schema.names)
        self.records = sorted(self._records(), key=lambda record: record.index)

    def _records(self) -> Iterator[Record]:
        for batch in self.batches:
            for table in self.tables:
                rows = batch.column(table)[0].values
                names = ("index", "cpu", "cpu_seq", "space")
                spaces = "space" if table != "files" else "cpu"
                columns = (rows.field(n if n != "space" else spaces).to_pylist() for n in names)
                for index, cpu, cpu_seq, space in zip(*columns, strict=True):
                    if cpu != _NO_CPU:
                        yield Record(index, table, cpu, cpu_seq, 0 if table == "files" else space)

    def choose(self, dice: random.Random, way: str = "") -> Lost:
        """Records that a loss may take, in one of the ways in which they get lost."""
        records, way = self.records, way or dice.choice(WAYS)
        if way == "table":
            table = dice.choice(self.tables)
            found = [record for record in records if record.table == table]
            return frozenset(r.index for r in dice.sample(found, min(len(found), dice.randint(1, 5))))
        if way == "run":
            first = dice.randrange(len(records))
            return frozenset(r.index for r in records[first : first + dice.choice((2, 5, 20, 100))])
        if way == "cpu":  # one CPU's records of a while
            cpu, first = dice.choice(records).cpu, dice.randrange(len(records))
            part = records[first : first + dice.choice((20, 100, 400))]
            return frozenset(r.index for r in part if r.cpu == cpu and dice.random() < 0.7)
        if way in ("first", "last"):
            space = dice.choice([record.space for record in records if record.space])
            own = [record for record in records if record.space == space]
            count = dice.randint(1, 4)
            return frozenset(r.index for r in (own[:count] if way == "first" else own[-count:]))
        if way in ("forks", "files"):
            found = [r for r in records if r.table == ("tasks" if way == "forks" else "files")]
            return frozenset(r.index for r in found if dice.random() < 0.5)
        share = {"one": 0.0, "some": 0.005, "many": 0.2}[way]
        chosen = {record.index for record in records if dice.random() < share}
        return frozenset(chosen | {dice.choice(records).index})

    def write(self, target: Path, lost: Collection[int], noted: bool = True) -> None:
        """Write the trace without these records; ``noted``: the recorder counted what found no room."""
        gone = np.fromiter(lost, np.uint64, len(lost))
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, self.schema) as stream:
            for batch in self.batches:
                columns = [self._column(batch, name, gone, len(lost) if noted else 0) for name in batch.schema.names]
                stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    def _column(self, batch: Any, name: str, gone: Any, noted: int) -> Any:
        column = batch.column(name)
        kind = self.schema.field(name).type
        if name in RECORDED:
            rows = column[0].values
            keep = ~np.isin(rows.field("index").to_numpy(zero_copy_only=False), gone)
            keep |= rows.field("cpu").to_numpy(zero_copy_only=False) == _NO_CPU
            rows = rows.filter(pa.array(keep))
            return pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows).cast(kind)
        if name == "end" and noted and column[0].as_py():
            ends = [{**end, "lost": noted} for end in column[0].as_py()]
            return pa.array([ends], kind)
        return column


def shrink(lost: Lost, fails: Any) -> Lost:
    """As few of the lost records as still make ``fails`` true (delta debugging)."""
    kept, size = sorted(lost), max(len(lost) // 2, 1)
    while True:
        for first in range(0, len(kept), size):
            fewer = kept[:first] + kept[first + size :]
            if fewer and fails(frozenset(fewer)):
                kept = fewer
                break
        else:
            if size == 1:
                return frozenset(kept)
            size = max(size // 2, 1)
