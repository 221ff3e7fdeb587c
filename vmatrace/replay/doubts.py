"""What lost records may explain: a difference is no divergence where a record that is missing may tell why."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from errno import EINVAL
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from vmatrace.replay.occurrence import errno_name
from vmatrace.vma import EXEC, PKEY_MASK, READ, Vma

if TYPE_CHECKING:
    from vmatrace.replay.judge import Judge

LOST: Final = "records were lost just before"
LOST_WITHIN: Final = "records were lost while it ran"
UNKNOWN_STATE: Final = "the address space is not known here"
UNDESCRIBED: Final = "a mapped file is not described in the trace"
_FILE_DOUBT: Final = "records were lost since this file was described"
ENDED: Final = "the recording ended while it ran"
FORKED_UFFD: Final = "whether a userfaultfd follows its VMAs through a fork is not in the trace"
_DRIVER: Final = "whether the driver lets its mappings be split is not in the trace"
_LIMIT_DOUBT: Final = "a lost record may have changed the limits of the process"

# errnos that resource limits, capabilities, protection keys taken or the personality decide.
_OF_LIMITS: Final = frozenset(("ENOMEM", "EAGAIN", "EPERM"))
_READ_EXEC: Final = READ | EXEC
NEVER: Final = 1 << 62


class Losses:
    """Where records of a trace are missing, as intervals of ``index``."""

    def __init__(self, gaps: Sequence[tuple[int, int]]) -> None:
        ordered = sorted(gaps)
        self._starts = [lo for lo, _ in ordered]
        self._ends = list(accumulate((hi for _, hi in ordered), max))

    def between(self, first: int, last: int) -> bool:
        """Whether a record may be missing after ``first`` and before ``last``."""
        at = bisect_left(self._starts, last)
        return at > 0 and self._ends[at - 1] > first


def excuse(judge: Judge) -> str:
    """Why a difference found in an operation proves nothing, or ""."""
    files, losses = judge.all.files, judge.all.losses
    if judge.state.forked_uffd and _follows_a_fork(judge):
        return FORKED_UFFD
    if _refused_by_driver(judge):
        return _DRIVER
    first, last = judge.seen.first_index, judge.seen.last_index
    if not judge.seen.sections and first > judge.all.last_section:
        return ENDED
    if judge.seen.call is None and judge.seen.columns.number < 0:
        last = NEVER  # it belongs to no operation, or its call, which came at any time later, was lost
    if losses is None or not losses.between(-1, last):
        return ""
    lo, hi = judge.span()
    touched = judge.seen.before_in(lo, hi) + judge.seen.after_in(lo, hi)
    touched += judge.state.space.overlapping(lo, hi)
    if any(vma.file is not None and not files.is_described(vma.file) for vma in touched):
        return UNDESCRIBED
    if not judge.seen.sections:
        first = judge.all.ended(judge.seen.tid)
    if losses.between(first, last):
        return LOST_WITHIN
    if not judge.state.counters_known:
        return UNKNOWN_STATE
    if any(losses.between(files.described(vma.file), last) for vma in touched if vma.file is not None):
        return _FILE_DOUBT
    return _LIMIT_DOUBT if _by_limits(judge, touched) else ""


def _follows_a_fork(judge: Judge) -> bool:
    """Whether VMAs copied by a fork kept their userfaultfd: UFFD_FEATURE_EVENT_FORK is in no record."""
    lo, hi = judge.span()
    seen = judge.seen.before_in(lo, hi) + judge.seen.after_in(lo, hi)
    return any(vma.uffd is not None and judge.state.was_registered(vma) for vma in seen)


def _refused_by_driver(judge: Judge) -> bool:
    """Whether a call failed with EINVAL, changed nothing, and a driver may have refused to split its mapping."""
    call = judge.seen.call
    if call is None or call.result != -EINVAL or judge.seen.changed or judge.before:
        return False
    lo, hi = judge.span()
    return any(judge.all.files.may_refuse_splits(vma.file) for vma in judge.seen.before_in(lo, hi))


def _by_limits(judge: Judge, touched: Sequence[Vma]) -> bool:
    """Whether limits, the personality or protection keys that no record tells may have decided."""
    result, call = judge.result, judge.seen.call
    if result is not None and result.errno in _OF_LIMITS:
        return True
    if judge.seen.name == "brk" and result is not None and call is not None and call.result != result.ret:
        return True  # brk has no errno: it gives the old break
    if call is not None and -4096 < call.result < 0 and errno_name(call.result) in _OF_LIMITS:
        return True
    # READ_IMPLIES_EXEC, or an execute-only key.
    return any(vma.flags & _READ_EXEC == _READ_EXEC or vma.flags & PKEY_MASK for vma in touched)
