"""Builds small BTF blobs for tests, record by record, as the kernel's format describes them."""

from __future__ import annotations

import struct

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST = range(1, 11)
FUNC, PROTO, TYPE_TAG, ENUM64 = 12, 13, 18, 19


class BtfBlob:
    """Collects types and gives the blob; each method returns the new type's id."""

    def __init__(self) -> None:
        self.strings = b"\0"
        self.records: list[bytes] = []
        self._named: dict[str, int] = {"": 0}
        self.ulong = self.int("long unsigned int", 8)

    def name(self, text: str) -> int:
        if text not in self._named:
            self._named[text] = len(self.strings)
            self.strings += text.encode() + b"\0"
        return self._named[text]

    def add(self, name: str, kind: int, vlen: int, third: int, body: bytes = b"", flag: bool = False) -> int:
        info = kind << 24 | vlen | flag << 31
        self.records.append(struct.pack("<III", self.name(name), info, third) + body)
        return len(self.records)

    def int(self, name: str, size: int) -> int:
        return self.add(name, INT, 0, size, struct.pack("<I", size * 8))

    def ptr(self, target: int) -> int:
        return self.add("", PTR, 0, target)

    def array(self, element: int, count: int) -> int:
        return self.add("", ARRAY, 0, 0, struct.pack("<III", element, self.ulong, count))

    def typedef(self, name: str, target: int) -> int:
        return self.add(name, TYPEDEF, 0, target)

    def const(self, target: int) -> int:
        return self.add("", CONST, 0, target)

    def struct(
        self,
        name: str,
        size: int,
        members: list[tuple[str, int, int]],
        kind: int = STRUCT,
        fields: bool = False,
    ) -> int:
        """Members are (name, type, offset in bits); with ``fields`` the width is in bits 24-31 of it."""
        body = b"".join(struct.pack("<III", self.name(n), t, where) for n, t, where in members)
        return self.add(name, kind, len(members), size, body, fields)

    def enum(self, name: str, values: dict[str, int], wide: bool = False, signed: bool = False) -> int:
        body = b""
        for key, value in values.items():
            low, high = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
            body += struct.pack("<II", self.name(key), low) + (struct.pack("<I", high) if wide else b"")
        return self.add(name, ENUM64 if wide else ENUM, len(values), 8 if wide else 4, body, signed)

    def proto(self, params: list[tuple[str, int]], returns: int = 0) -> int:
        body = b"".join(struct.pack("<II", self.name(n), t) for n, t in params)
        return self.add("", PROTO, len(params), returns, body)

    def func(self, name: str, params: list[tuple[str, int]], returns: int = 0) -> int:
        proto = self.proto(params, returns)
        return self.add(name, FUNC, 1, proto)

    def tracepoint(self, name: str, params: list[tuple[str, int]], named: bool = True) -> None:
        data = ("__data", self.ptr(0))
        proto = self.proto([("", kind) for _, kind in [data, *params]])
        self.typedef("btf_trace_" + name, self.ptr(proto))
        if named:
            self.func("__traceiter_" + name, [data, *params])

    def blob(self) -> bytes:
        types = b"".join(self.records)
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(self.strings))
        return header + types + self.strings
