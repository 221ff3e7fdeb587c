"""Names of functions in mapped files, from the symbol tables of the files as they are now."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from vmatrace.ingest import FileInfo


class Symbols:
    """Names of functions by file and offset; each file is read once, when first asked for."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int], _File | None] = {}

    def name(self, info: FileInfo, offset: int) -> str | None:
        """``function+0x12`` of the byte at ``offset`` of a file.

        None where the file has no symbol there, cannot be read, or is not the one that was traced.
        """
        key = (info.path, info.ino)
        if key not in self._files:
            self._files[key] = _read(info)
        file = self._files[key]
        return file.name(offset) if file else None


class _File:
    """The functions of one ELF file by address, and where its segments lie."""

    def __init__(self, elf: Any) -> None:
        self._segments = [
            (part["p_offset"], part["p_filesz"], part["p_vaddr"])
            for part in elf.iter_segments()
            if part["p_type"] == "PT_LOAD"
        ]
        self._functions = sorted(_functions(elf))

    def name(self, offset: int) -> str | None:
        for start, size, virtual in self._segments:
            if start <= offset < start + size:
                address = offset - start + virtual
                at = bisect_right(self._functions, address, key=lambda function: function[0]) - 1
                if at < 0 or address >= self._functions[at][0] + max(self._functions[at][1], 1):
                    return None
                return f"{self._functions[at][2]}+{address - self._functions[at][0]:#x}"
        return None


def _functions(elf: Any) -> Iterator[tuple[int, int, str]]:
    """Address, size in bytes and name of each function, of the full table of symbols where there is one."""
    table = elf.get_section_by_name(".symtab") or elf.get_section_by_name(".dynsym")
    for symbol in table.iter_symbols() if table else ():
        if symbol["st_info"]["type"] in ("STT_FUNC", "STT_LOOS") and symbol["st_value"]:
            yield symbol["st_value"], symbol["st_size"], symbol.name


def _read(info: FileInfo) -> _File | None:
    # Only here: most commands name no functions, and a machine that has no such library still shows offsets.
    try:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
    except ImportError:
        return None
    try:
        with open(info.path, "rb") as stream:
            if os.fstat(stream.fileno()).st_ino != info.ino:
                return None
            return _File(ELFFile(stream))
    except (OSError, ValueError, ELFError):
        return None
