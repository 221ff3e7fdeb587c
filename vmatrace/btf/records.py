"""Finds the records of a BTF blob: checks its header, walks its types once, and caches that walk.

The walk is what costs time on first use; its result is kept in the cache directory under the hash of the
blob's content, and is checked against the records themselves before it is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmatrace.errors import BadTrace, escape

_MAGIC = 0xEB9F
_HEADER = "HBBIIIII"
_HEADER_SIZE = struct.calcsize("=" + _HEADER)

# The kinds of records, by the numbers of the format.
(INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC) = range(1, 13)
(PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64) = range(13, 20)

# 32-bit words that follow the three common ones: a fixed number, and a number per counted element.
_FIXED = {INT: 1, ARRAY: 3, VAR: 1, DECL_TAG: 1}
PER_ELEMENT = {STRUCT: 3, UNION: 3, ENUM: 2, PROTO: 2, DATASEC: 3, ENUM64: 3}
_KINDS = 20
_FIXED_WORDS = np.array([_FIXED.get(kind, 0) for kind in range(_KINDS)], np.int64)
_ELEMENT_WORDS = np.array([PER_ELEMENT.get(kind, 0) for kind in range(_KINDS)], np.int64)

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Blob:
    """The parts of a BTF blob: its strings, its type records as words, and where each record begins."""

    strings: bytes
    words: Words
    starts: Words
    digest: str
    source: str


def read_blob(data: bytes, source: str) -> Blob:
    """The parts of a blob, from the cache where that has them; raises `BadTrace` where it is damaged."""
    order, strings, words = _sections(data, source)
    digest = hashlib.sha256(data).hexdigest()
    native = words if order == sys.byteorder else words.byteswap()
    starts = _cached_starts(digest, native)
    if starts is None:
        starts = _find_starts(native, source)
        _store_starts(digest, starts)
    return Blob(strings, native, starts, digest, source)


def bad_btf(source: str, why: str) -> BadTrace:
    """The error for a BTF file that is none or is damaged."""
    return BadTrace(
        f"BTF, {escape(source)}: {escape(why)}",
        "give a file with the content of /sys/kernel/btf/vmlinux",
    )


def _sections(data: bytes, source: str) -> tuple[str, bytes, Words]:
    if len(data) < _HEADER_SIZE:
        raise bad_btf(source, f"{len(data)} bytes are too few for BTF" if data else "empty")
    order = "little" if data[0] == _MAGIC & 0xFF else "big"
    fields = struct.unpack_from(("<" if order == "little" else ">") + _HEADER, data)
    magic, version, _flags, header_len, type_off, type_len, str_off, str_len = fields
    if magic != _MAGIC:
        raise bad_btf(source, "not BTF (its first two bytes are not the BTF mark)")
    if version != 1:
        raise bad_btf(source, f"BTF version {version}; version 1 is what is known")
    ends = (header_len + type_off + type_len, header_len + str_off + str_len)
    if header_len < _HEADER_SIZE or (type_off | type_len | header_len) % 4 or max(ends) > len(data):
        raise bad_btf(source, f"cut short or damaged: {len(data)} bytes, the header speaks of {max(ends)}")
    strings = data[header_len + str_off : ends[1]]
    if not strings or strings[0] or strings[-1]:
        raise bad_btf(source, "damaged: its string table does not begin and end with a zero byte")
    words = np.frombuffer(data, np.uint32, type_len // 4, header_len + type_off)
    return order, strings, words


def _find_starts(words: Words, source: str) -> Words:
    """Where each record begins, in words: a walk, since each record's length depends on its kind."""
    values, total, place = words.tolist(), len(words), 0
    starts: list[int] = []
    while place + 3 <= total:
        info = values[place + 1]
        kind = info >> 24 & 0x7F
        if not 1 <= kind < _KINDS:
            raise bad_btf(source, f"type {len(starts) + 1} is of kind {kind}, which is not known")
        starts.append(place)
        place += 3 + _FIXED.get(kind, 0) + PER_ELEMENT.get(kind, 0) * (info & 0xFFFFFF)
    if place != total:
        raise bad_btf(source, f"damaged: type {len(starts)} reaches past the end of the types")
    return np.array(starts, np.uint32)


def _cache_file(digest: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path(os.path.expanduser("~")) / ".cache"
    return base / "vmatrace" / f"btf-{digest}.index"


def _cached_starts(digest: str, words: Words) -> Words | None:
    """The stored index, if it is there and fits these very records (a stale or damaged one does not)."""
    try:
        raw = _cache_file(digest).read_bytes()
    except OSError:
        return None
    if len(raw) % 4 or not raw:
        return None
    starts = np.frombuffer(raw, np.uint32)
    if starts[0] != 0 or int(starts.max()) + 3 > len(words):
        return None
    info = words[starts + 1]
    kinds = (info >> np.uint32(24)) & np.uint32(0x7F)
    if int(kinds.min()) < 1 or int(kinds.max()) >= _KINDS:
        return None
    lengths = 3 + _FIXED_WORDS[kinds] + _ELEMENT_WORDS[kinds] * (info & np.uint32(0xFFFFFF))
    ends = starts.astype(np.int64) + lengths
    fits = np.array_equal(ends[:-1], starts[1:]) and int(ends[-1]) == len(words)
    return starts if fits else None


def _store_starts(digest: str, starts: Words) -> None:
    """Keep the index for the next time; where that cannot be done, the next time is only slower."""
    if not len(starts):
        return
    target = _cache_file(digest)
    with contextlib.suppress(OSError):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".btf-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(starts.tobytes())
            os.replace(name, target)
        except OSError:
            os.unlink(name)
