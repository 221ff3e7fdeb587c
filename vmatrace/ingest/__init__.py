"""Turns the records of a trace into ordered, validated operations with their effects and gaps."""

from vmatrace.ingest.decisions import Decision, Decisions, Descriptor
from vmatrace.ingest.effects import Effect, Evidence
from vmatrace.ingest.match import KIND_NAMES, Operations
from vmatrace.ingest.trace import Trace, errno_name
from vmatrace.ingest.views import FileInfo, Operation, Section, Space, Walk

__all__ = [
    "KIND_NAMES", "Decision", "Decisions", "Descriptor", "Effect", "Evidence", "FileInfo", "Operation",
    "Operations", "Section", "Space", "Trace", "Walk", "errno_name",
]  # fmt: skip
