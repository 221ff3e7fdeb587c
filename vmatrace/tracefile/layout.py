"""The Arrow schema of a trace file, made from `vmatrace.schema`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import pyarrow as pa

from vmatrace.schema import INFORMATIONAL, INPUT, LAYER_TABLES, ROW_TABLES, SCHEMA_VERSION, TABLES, Field

METADATA_KEY: Final = b"vmatrace"
END_FIELDS: Final = (
    Field("reason", "text", INFORMATIONAL, "why the recording ended"),
    Field("records", "u64", INPUT, "records that the kernel handed over"),
    Field("lost", "u64", INPUT, "records that found no room"),
    Field("cpu_seq", "list<u32>", INPUT, "last cpu_seq of each CPU"),
    Field("spaces", "list<u32>", INPUT, "address spaces seen"),
    Field("space_seq", "list<u32>", INPUT, "last seq of each of them"),
    Field("alive", "list<u32>", INFORMATIONAL, "traced processes that lived on"),
)
"""The end mark: a table of no rows in each batch but the last of a complete trace."""

ARROW_TYPES: Final = {
    "u8": pa.uint8(),
    "u16": pa.uint16(),
    "u32": pa.uint32(),
    "u64": pa.uint64(),
    "i64": pa.int64(),
    "text": pa.string(),
}


def tables_of(layers: Iterable[str]) -> dict[str, tuple[Field, ...]]:
    """The tables of a trace with those layers."""
    return {name: fields for name, fields in TABLES.items() if LAYER_TABLES.get(name) in (None, *layers)}


def arrow_schema(header: Mapping[str, Any]) -> pa.Schema:
    """The Arrow schema of a trace file with that header; each field carries its role and meaning."""
    tables = tables_of(header.get("layers", ()))
    fields = [pa.field(name, _list_of(columns), nullable=False) for name, columns in tables.items()]
    fields.append(pa.field("end", _list_of(END_FIELDS), nullable=False))
    text = json.dumps({**header, "schema": SCHEMA_VERSION}, ensure_ascii=True)
    return pa.schema(fields, metadata={METADATA_KEY: text.encode()})


def _list_of(columns: Sequence[Field]) -> pa.DataType:
    struct = pa.struct([arrow_field(field) for field in columns])
    return pa.list_(pa.field("item", struct, nullable=False))


@cache
def arrow_field(field: Field) -> pa.Field:
    """The Arrow field of a column, with its role and meaning."""
    metadata = {"role": field.role, "doc": field.doc}
    return pa.field(field.name, arrow_type(field), nullable=False, metadata=metadata)


@cache
def arrow_type(field: Field) -> pa.DataType:
    """The Arrow type of a column."""
    inner = element(field)
    if inner is None:
        return ARROW_TYPES[field.type]
    if inner in ROW_TABLES:
        return _list_of(ROW_TABLES[inner])
    return pa.list_(pa.field("item", ARROW_TYPES[inner], nullable=False))


def element(field: Field) -> str | None:
    """What a list column is a list of; None for a plain column."""
    return field.type[5:-1] if field.type.startswith("list<") else None
