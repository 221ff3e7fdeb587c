"""User stacks of calls as a trace recorded with --stacks has them: return addresses, no names yet."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmatrace.ingest.trace import Trace


class Stacks:
    """The stacks of a trace; ``present`` is False where it was recorded without."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.present = "stacks" in trace.header.get("layers", ())

    def of_operation(self, row: int) -> int | None:
        """The number of the stack of the operation in that row, 0 where it was lost, None where it has none."""
        call = int(self._trace.operations.call[row])
        return self._of_call.get(int(self._trace.records.calls["index"][call])) if call >= 0 else None

    def addresses(self, number: int) -> tuple[int, ...]:
        """The return addresses of a stack, innermost first; none where it is not in the trace."""
        return self._frames.get(number, ())

    @cached_property
    def _of_call(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for tables in self._trace.file.batches() if self.present else ():
            table = tables["call_stacks"]
            found.update(zip(table["index"].tolist(), table["stack"].tolist(), strict=True))
        return found

    @cached_property
    def _frames(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for tables in self._trace.file.batches() if self.present else ():
            table = tables["stacks"]
            first, addresses = table.offsets("frames").tolist(), table.child("frames")["address"].tolist()
            for at, number in enumerate(table["stack"].tolist()):
                found[number] = tuple(addresses[first[at] : first[at + 1]])
        return found
