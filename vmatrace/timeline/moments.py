"""Reads the words in which a user names a moment of a trace."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any, Final

from vmatrace.errors import UsageError
from vmatrace.ingest import Trace
from vmatrace.timeline.space import Snapshot, Timeline

_UNITS: Final = {"": 1, "ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_FORMS: Final = "give ns since the first record, 1.5s, an ISO time, op:N or end"


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment: the end, the state after operation ``op``, or ``time`` ns since the first record."""

    op: int | None = None
    time: int | None = None

    def of(self, timeline: Timeline) -> Snapshot:
        """The state of an address space at this moment."""
        if self.op is not None:
            return timeline.at_op(self.op)
        return timeline.at_end() if self.time is None else timeline.at(self.time)


def parse_moment(text: str, trace: Trace) -> Moment:
    """``end``, ``op:N``, ns since the first record, ``1.5s`` (ms, us, ns too) or an ISO time.

    An ISO time without a zone is local; it goes by the clock of the recorded machine at the trace's start.
    """
    text = text.strip()
    if text == "end":
        return Moment()
    if found := re.fullmatch(r"(?:op:|#)(\d+)", text):
        return Moment(op=int(found[1]))
    if found := re.fullmatch(r"(\d+)(\.\d+)?(ns|us|ms|s|)", text):
        unit = _UNITS[found[3]]
        return Moment(time=int(found[1]) * unit + (round(float(found[2]) * unit) if found[2] else 0))
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no moment of a trace", _FORMS) from None
    return Moment(time=_since_first_record(moment.astimezone(), trace))


def _since_first_record(moment: datetime.datetime, trace: Trace) -> int:
    clock: Any = trace.header.get("clock")
    try:
        offset = int(clock["realtime_ns"]) - int(clock["monotonic_ns"])
    except (KeyError, TypeError, ValueError):
        raise UsageError("the trace does not say what time it was", "give ns since the first record") from None
    whole = int(moment.replace(microsecond=0).timestamp()) * 1_000_000_000 + moment.microsecond * 1_000
    since = whole - offset - trace.records.first_time
    if since < 0:
        raise UsageError(f"{moment.isoformat()} is before the trace's first record", _FORMS)
    return since
