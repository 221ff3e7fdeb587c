"""Shows what the Linux kernel decides about memory maps: merges, splits, and the rule behind each.

``vmatrace.record(["ls"])`` makes a trace, ``vmatrace.open(path)`` reads one. The names below are the public
interface; they are imported when first used, so that the command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmatrace.api import Trace, TraceInfo, open, record
    from vmatrace.errors import BadTrace, CannotTrace, UsageError, VmatraceError
    from vmatrace.kernel import rule_set
    from vmatrace.replay import ReplayResult, Verdict
    from vmatrace.timeline import Timeline, difference
    from vmatrace.vma import AddressSpace, Vma

__version__ = "0.1.0"

_PLACES = {
    "open": "api",
    "record": "api",
    "Trace": "api",
    "TraceInfo": "api",
    "Timeline": "timeline",
    "difference": "timeline",
    "ReplayResult": "replay",
    "Verdict": "replay",
    "Vma": "vma",
    "AddressSpace": "vma",
    "rule_set": "kernel",
    "VmatraceError": "errors",
    "UsageError": "errors",
    "CannotTrace": "errors",
    "BadTrace": "errors",
}

__all__ = [
    "open",
    "record",
    "Trace",
    "TraceInfo",
    "Timeline",
    "difference",
    "ReplayResult",
    "Verdict",
    "Vma",
    "AddressSpace",
    "rule_set",
    "VmatraceError",
    "UsageError",
    "CannotTrace",
    "BadTrace",
]


def __getattr__(name: str) -> object:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
