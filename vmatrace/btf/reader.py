"""Reads BTF, the kernel's own description of its types: struct members, prototypes, enums.

No bpftool and no headers are needed. A type is decoded only when it is asked for.
Format: Documentation/bpf/btf.rst in the kernel's tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from vmatrace.btf import records as rec
from vmatrace.errors import BadTrace, CannotTrace, escape

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")

_QUALIFIERS = frozenset({rec.VOLATILE, rec.CONST, rec.RESTRICT, rec.TYPE_TAG})
_WORD_OF = {rec.VOLATILE: "volatile", rec.CONST: "const", rec.RESTRICT: "restrict"}
_TAG_OF = {rec.STRUCT: "struct", rec.UNION: "union", rec.ENUM: "enum", rec.ENUM64: "enum", rec.FWD: "struct"}

# A sound type chain is a handful of steps long; only a damaged file has a longer one, or a loop.
_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct, offsets counted from the start of the outermost one asked for.

    ``offset_bytes`` is the byte that holds its first bit, ``bit_offset`` that bit's absolute number,
    ``bit_size`` the width of a bit field (0: not one), ``size`` that of its type in bytes.
    """

    name: str
    offset_bytes: int
    bit_offset: int
    bit_size: int
    size: int
    type_name: str
    type_id: int


@dataclass(frozen=True, slots=True)
class Struct:
    """A struct or union: its size in bytes and its named members, those of anonymous parts included."""

    name: str
    size: int
    members: Mapping[str, Member]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: its name (may be empty), C type, whether that is a pointer, and its size in bytes."""

    name: str
    type_name: str
    is_pointer: bool
    size: int


@dataclass(frozen=True, slots=True)
class Function:
    """A function's prototype."""

    name: str
    params: tuple[Param, ...]
    returns: str

    def param(self, name: str) -> int | None:
        """The position of the parameter with that name, counted from 0; None where there is none."""
        return next((i for i, param in enumerate(self.params) if param.name == name), None)


class Btf:
    """The types of one kernel; made by `load` or `parse`."""

    def __init__(self, blob: rec.Blob) -> None:
        self._strings = blob.strings
        self._words = blob.words
        self._starts = blob.starts
        # In the first words of each record: the name's place, and kind, element count and a flag in one.
        self._names: rec.Words = blob.words[blob.starts]
        self._kinds: rec.Words = (blob.words[blob.starts + 1] >> np.uint32(24)) & np.uint32(0x7F)
        self.digest = blob.digest
        self.source = blob.source
        long_id = self._find("long unsigned int", (rec.INT,))
        self.pointer_size = 8 if long_id is None else self._field(long_id, 2)

    def __len__(self) -> int:
        return len(self._starts)

    def has_type(self, name: str) -> bool:
        """Whether a struct, union, enum, typedef, integer or function has that name."""
        return self._find(name, None) is not None

    def find_struct(self, name: str) -> Struct | None:
        """The struct or union of that name or typedef; None where there is none."""
        type_id = self._find(name, (rec.STRUCT, rec.UNION))
        if type_id is None:
            alias = self._find(name, (rec.TYPEDEF,))
            type_id = None if alias is None else self._struct_behind(alias)
        return None if type_id is None else self._struct_at(type_id)

    def struct(self, name: str) -> Struct:
        """The struct or union of that name; raises `CannotTrace` where the kernel has none."""
        found = self.find_struct(name)
        if found is None:
            raise CannotTrace(
                f"BTF of {escape(self.source)}: no struct {name}",
                "`vmatrace doctor` shows what this kernel offers",
            )
        return found

    def member(self, struct_name: str, path: str) -> Member | None:
        """The member at a dotted path (``vm_userfaultfd_ctx.ctx``), anonymous parts looked through."""
        outer = self.find_struct(struct_name)
        bits, found = 0, None
        for part in path.split("."):
            found = None if outer is None else outer.members.get(part)
            if found is None:
                return None
            bits += found.bit_offset
            inner = self._struct_behind(found.type_id)
            outer = None if inner is None else self._struct_at(inner)
        return None if found is None else replace(found, name=path, bit_offset=bits, offset_bytes=bits // 8)

    def offset(self, path: str) -> int:
        """The byte offset of ``struct.member`` (further dots go deeper); raises `CannotTrace` without it."""
        struct_name, _, rest = path.partition(".")
        member = self.member(struct_name, rest)
        if member is None:
            raise CannotTrace(
                f"BTF of {escape(self.source)}: no member {path}",
                "`vmatrace doctor` shows what this kernel offers",
            )
        return member.offset_bytes

    def function(self, name: str) -> Function | None:
        """The prototype of a function; None where BTF has none (absent, inlined, or renamed)."""
        type_id = self._find(name, (rec.FUNC,))
        return None if type_id is None else self._prototype(name, self._field(type_id, 2))

    def function_id(self, name: str) -> int | None:
        """The number of a function's type, by which BPF programs are attached to it."""
        return self._find(name, (rec.FUNC,))

    def tracepoint(self, name: str) -> Function | None:
        """The arguments of a tracepoint as a raw tracepoint program gets them; None where it is unknown.

        Names come from the kernel's own iterator function, since the typedef that fixes order and types
        has none.
        """
        type_id = self._find("btf_trace_" + name, (rec.TYPEDEF,))
        proto = None if type_id is None else self._behind_pointer(type_id)
        if proto is None:
            return None
        found = self._prototype(name, proto)
        named = self.function("__traceiter_" + name) or self.function("__probestub_" + name)
        params = found.params
        if named is not None and len(named.params) == len(params):
            params = named.params
        return Function(name, params[1:], found.returns)

    def tracepoints(self) -> tuple[str, ...]:
        """The names of all tracepoints."""
        prefix = "btf_trace_"
        names = (self._name(int(off)) for off in self._names[self._kinds == rec.TYPEDEF])
        return tuple(sorted({name[len(prefix) :] for name in names if name.startswith(prefix)}))

    def functions(self) -> frozenset[str]:
        """The names of all functions that BTF describes."""
        return frozenset(self._name(int(off)) for off in self._names[self._kinds == rec.FUNC])

    def typedef(self, name: str) -> str | None:
        """The C type that a typedef stands for."""
        type_id = self._find(name, (rec.TYPEDEF,))
        return None if type_id is None else self._type_name(self._field(type_id, 2))

    def enum(self, name: str) -> Mapping[str, int] | None:
        """The values of an enum by name."""
        type_id = self._find(name, (rec.ENUM, rec.ENUM64))
        if type_id is None:
            return None
        wide = self._kind(type_id) == rec.ENUM64
        signed = bool(self._field(type_id, 1) >> 31)
        width = 64 if wide else 32
        values = {}
        for name_off, low, *high in self._elements(type_id).tolist():
            value = low | high[0] << 32 if wide else low
            negative = signed and value >> (width - 1)
            values[self._name(name_off)] = value - (1 << width) if negative else value
        return MappingProxyType(values)

    # What follows decodes records; type ids count from 1, and 0 is void.

    def _find(self, name: str, kinds: tuple[int, ...] | None) -> int | None:
        wanted = name.encode("utf-8", "surrogateescape") + b"\0"
        if wanted == b"\0":
            return None
        # Names are stored once each; a writer may also share the tail of a longer name.
        places = [self._strings.find(b"\0" + wanted) + 1]
        found = self._first_of(places, kinds) if places[0] else None
        return found or self._first_of(list(self._places(wanted)), kinds)

    def _first_of(self, places: list[int], kinds: tuple[int, ...] | None) -> int | None:
        for record in np.flatnonzero(np.isin(self._names, np.array(places, np.uint32))):
            if kinds is None or int(self._kinds[record]) in kinds:
                return int(record) + 1
        return None

    def _places(self, wanted: bytes) -> Iterator[int]:
        place = self._strings.find(wanted)
        while place >= 0:
            yield place
            place = self._strings.find(wanted, place + 1)

    def _field(self, type_id: int, word: int) -> int:
        return int(self._words[self._start(type_id) + word])

    def _start(self, type_id: int) -> int:
        if not 1 <= type_id <= len(self._starts):
            raise self._broken(f"type {type_id} is referred to and not there")
        return int(self._starts[type_id - 1])

    def _kind(self, type_id: int) -> int:
        return int(self._kinds[type_id - 1]) if self._start(type_id) >= 0 else 0

    def _elements(self, type_id: int) -> rec.Words:
        start, kind = self._start(type_id), self._kind(type_id)
        count, width = self._field(type_id, 1) & 0xFFFFFF, rec.PER_ELEMENT[kind]
        return self._words[start + 3 : start + 3 + count * width].reshape(count, width)

    def _name(self, place: int) -> str:
        end = self._strings.find(b"\0", place) if place < len(self._strings) else -1
        if end < 0:
            raise self._broken(f"a name at {place} is outside the {len(self._strings)} bytes of strings")
        return self._strings[place:end].decode("utf-8", "surrogateescape")

    def _broken(self, why: str) -> BadTrace:
        return rec.bad_btf(self.source, why)

    def _struct_at(self, type_id: int) -> Struct:
        members: dict[str, Member] = {}
        for member in self._members(type_id, 0, 0):
            members.setdefault(member.name, member)
        name = self._name(self._field(type_id, 0))
        return Struct(name, self._field(type_id, 2), MappingProxyType(members))

    def _members(self, type_id: int, base_bits: int, depth: int) -> Iterator[Member]:
        if depth > _DEPTH:
            raise self._broken("a struct holds itself")
        has_fields = bool(self._field(type_id, 1) >> 31)
        for name_off, member_type, where in self._elements(type_id).tolist():
            bits = base_bits + (where & 0xFFFFFF if has_fields else where)
            width = where >> 24 if has_fields else 0
            name = self._name(name_off)
            if name:
                size = self._size(member_type)
                yield Member(name, bits // 8, bits, width, size, self._type_name(member_type), member_type)
            elif (inner := self._struct_behind(member_type)) is not None:
                yield from self._members(inner, bits, depth + 1)

    def _resolve(self, type_id: int) -> int:
        """The type behind typedefs and qualifiers; 0 for void."""
        for _ in range(_DEPTH):
            if type_id == 0 or self._kind(type_id) not in (*_QUALIFIERS, rec.TYPEDEF):
                return type_id
            type_id = self._field(type_id, 2)
        raise self._broken("a typedef leads back to itself")

    def _struct_behind(self, type_id: int) -> int | None:
        found = self._resolve(type_id)
        return found if found and self._kind(found) in (rec.STRUCT, rec.UNION) else None

    def _behind_pointer(self, type_id: int) -> int | None:
        pointer = self._resolve(type_id)
        if not pointer or self._kind(pointer) != rec.PTR:
            return None
        proto = self._resolve(self._field(pointer, 2))
        return proto if proto and self._kind(proto) == rec.PROTO else None

    def _size(self, type_id: int) -> int:
        count = 1
        for _ in range(_DEPTH):
            type_id = self._resolve(type_id)
            kind = self._kind(type_id) if type_id else 0
            if kind == rec.PTR:
                return count * self.pointer_size
            if kind != rec.ARRAY:
                sized = kind in (rec.INT, rec.STRUCT, rec.UNION, rec.ENUM, rec.ENUM64, rec.FLOAT)
                return count * self._field(type_id, 2) if sized else 0
            count *= self._field(type_id, 5)
            type_id = self._field(type_id, 3)
        raise self._broken("an array holds itself")

    def _prototype(self, name: str, proto: int) -> Function:
        if self._kind(proto) != rec.PROTO:
            raise self._broken(f"function {name} has no prototype")
        params = []
        for name_off, type_id in self._elements(proto).tolist():
            behind = self._resolve(type_id)
            is_pointer = bool(behind) and self._kind(behind) == rec.PTR
            type_name, size = self._type_name(type_id), self._size(type_id)
            params.append(Param(self._name(name_off), type_name, is_pointer, size))
        return Function(name, tuple(params), self._type_name(self._field(proto, 2)))

    def _type_name(self, type_id: int, depth: int = 0) -> str:
        if depth > _DEPTH:
            raise self._broken("a type leads back to itself")
        if type_id == 0:
            return "void"
        kind = self._kind(type_id)
        name = self._name(self._field(type_id, 0))
        if kind == rec.PTR:
            inner = self._type_name(self._field(type_id, 2), depth + 1)
            return inner + ("*" if inner.endswith("*") else " *")
        if kind == rec.ARRAY:
            inner = self._type_name(self._field(type_id, 3), depth + 1)
            return f"{inner}[{self._field(type_id, 5)}]"
        if kind == rec.TYPE_TAG:
            return self._type_name(self._field(type_id, 2), depth + 1)
        if kind in _QUALIFIERS:
            inner = self._type_name(self._field(type_id, 2), depth + 1)
            word = _WORD_OF[kind]
            return f"{inner} {word}" if inner.endswith("*") else f"{word} {inner}"
        if kind == rec.PROTO:
            return "function"
        tag = "union" if kind == rec.FWD and self._field(type_id, 1) >> 31 else _TAG_OF.get(kind)
        return f"{tag} {name or '(anonymous)'}" if tag else name


def load(path: str | os.PathLike[str] | None = None) -> Btf:
    """The BTF of the running kernel, or of a file.

    Raises `CannotTrace` where the kernel offers none, `BadTrace` where the file is none or is damaged.
    """
    source = KERNEL_BTF if path is None else Path(path)
    try:
        data = source.read_bytes()
    except FileNotFoundError as error:
        if path is not None:
            raise rec.bad_btf(str(source), "no such file") from error
        raise CannotTrace(
            f"BTF, {source}: this kernel offers none",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF, as distributions' kernels are",
        ) from error
    except OSError as error:
        raise rec.bad_btf(str(source), error.strerror or "cannot be read") from error
    return parse(data, str(source))


def parse(data: bytes, source: str = "memory") -> Btf:
    """BTF from bytes; raises `BadTrace` where they are none or damaged."""
    return Btf(rec.read_blob(data, source))
