"""User stacks of operations with names: each return address by the mapping that held it then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmatrace.ingest import Trace
from vmatrace.ingest.stacks import Stacks
from vmatrace.timeline.document import escape_path
from vmatrace.timeline.space import Timeline
from vmatrace.timeline.symbols import Symbols


@dataclass(frozen=True, slots=True)
class Frame:
    """One function of a stack. ``offset``: bytes into ``file``, of which ``symbol`` is ``function+0x12``."""

    address: int
    file: str | None
    offset: int | None
    symbol: str | None

    def document(self) -> dict[str, Any]:
        """As a plain value."""
        return {"address": self.address, "file": self.file, "offset": self.offset, "symbol": self.symbol}


class NamedStacks:
    """The stacks of a trace. One that an address space shows again is named as at its first operation there."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._stacks = Stacks(trace)
        self._symbols = Symbols()
        self._timelines: dict[int, Timeline] = {}
        self._known: dict[tuple[int, int], list[Frame]] = {}

    @property
    def present(self) -> bool:
        """Whether the trace was recorded with --stacks."""
        return self._stacks.present

    def of(self, space: int, op: int | None) -> list[Frame] | None:
        """The stack of an operation, innermost first; empty: it was lost; None: the operation has none."""
        if op is None or not self.present:
            return None
        number = self._stacks.of_operation(self._trace.operation_row(space, op))
        if number is None:
            return None
        key = (space, number)
        if key not in self._known:
            self._known[key] = self._named(space, op, number)
        return self._known[key]

    def add_to(self, event: dict[str, Any]) -> dict[str, Any]:
        """The event with its stack as plain values under ``stack``, where the trace was recorded with --stacks."""
        if not self.present:
            return event
        stack = self.of(event["space"], event["op"])
        return {**event, "stack": None if stack is None else [frame.document() for frame in stack]}

    def _named(self, space: int, op: int, number: int) -> list[Frame]:
        if space not in self._timelines:
            self._timelines[space] = Timeline(self._trace, space)
        vmas = self._timelines[space].at_op(op).vmas
        frames = []
        for at, address in enumerate(self._stacks.addresses(number)):
            vma = next((vma for vma in vmas if vma.start <= address < vma.end), None)
            info = self._trace.file_info(vma.file) if vma is not None else None
            if vma is None or info is None:
                frames.append(Frame(address, None, None, None))
                continue
            offset = address - vma.start + vma.pgoff * self._trace.page_size
            # What follows a call in the last bytes of a function belongs to the next one.
            symbol = self._symbols.name(info, offset - (at > 0))
            frames.append(Frame(address, escape_path(info.path), offset, symbol))
        return frames
