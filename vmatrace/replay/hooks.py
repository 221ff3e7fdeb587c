"""A file's mmap_prepare hook as it was seen: what it set is an input to replay, and the call has a verdict."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vmatrace.ingest.decisions import Decision, Descriptor, Row
from vmatrace.replay.attempts import Outcome
from vmatrace.replay.files import LEARNABLE, SECRETMEM, FileInfo, HookSeen
from vmatrace.replay.occurrence import Occurrence, errno_name
from vmatrace.replay.result import FAILED, PASSED, UNDECIDED
from vmatrace.rules.context import Kernel
from vmatrace.rules.hooks import Mapping, run_hook
from vmatrace.rules.model import FileGiven, KernelError, MmState
from vmatrace.vma import DONTEXPAND, HUGETLB, LOCKED_MASK, MERGEABLE, AddressSpace, flag_names

if TYPE_CHECKING:
    from vmatrace.replay.engine import Replayer

HOOK_KINDS: Final = frozenset(("MMAP_PREPARE", "COMPAT_MMAP"))


def hook_of(made: Sequence[Decision]) -> HookSeen | None:
    """The one hook that ran in an operation, None where none was seen or several were."""
    calls = [each for each in made if each.what == "MMAP_PREPARE" and each.error == 0 and len(each.descs) == 2]
    if len(calls) != 1:
        return None
    before, after = calls[0].descs
    nested = any(each.what == "COMPAT_MMAP" and each.contains(calls[0]) for each in made)
    return HookSeen(after.flags & ~before.flags, before.flags & ~after.flags, bool(after.ops), nested)


def judge_hook(
    all: Replayer, asked: Decision, inner: Sequence[Decision], made: Sequence[Decision], seen: Occurrence
) -> Outcome:
    """The verdict of a call of a hook, or of the compatibility layer."""
    if asked.what == "COMPAT_MMAP":
        return _compat(all, asked, inner)
    if len(asked.descs) != 2:
        return _open("the descriptor was not read")
    before = asked.descs[0]
    info = _called(all, asked, seen)
    errno, flags, rules = _expected(all, asked, before, info)
    if asked.error < 0:
        name = errno_name(asked.error)
        if errno == name:
            return Outcome(PASSED, "", rules)
        if errno is None and (info is None or not info.ordinary):
            return _open(f"the hook failed with {name}: why is not captured")
        if errno is None:
            return _open(f"the hook of an ordinary file failed with {name}: its cause is not captured")
        return _failed(f"the hook failed with {name}, expected {errno}", rules, errno, name)
    if errno is not None:
        return _failed(f"the hook did not fail, expected {errno}", rules, errno, "0")
    return _compare(all, asked, made, flags, rules)


def _called(all: Replayer, asked: Decision, seen: Occurrence) -> FileInfo | None:
    """The file whose hook it is, where it is certain: one that the operation maps, or failed to map.

    Any other (the file beneath a SysV segment) is described nowhere, and its memory may have been a file that was.
    """
    before = asked.descs[0]
    called = asked.file or before.file
    mapped = {vma.file for vma in seen.after_in(before.start, before.end)}
    failed = seen.call.file if seen.call is not None else 0
    if called not in mapped and called != failed:
        return None
    return None if is_doubtful(all, called, seen) else all.files.info(called)


def is_doubtful(all: Replayer, file: Hashable, seen: Occurrence) -> bool:
    """Whether records were lost since a file was described: its memory may be another file's by now."""
    if all.losses is None or file is None:
        return False
    place = all.files.described(file)
    return not 0 <= place <= seen.last_index or all.losses.between(place, seen.last_index)


def _expected(
    all: Replayer, asked: Decision, before: Descriptor, info: FileInfo | None
) -> tuple[str | None, int | None, tuple[str, ...]]:
    """The errno and the flags afterwards that the rules give; flags None: a driver's own affair."""
    if info is None:
        return None, None, ("hook_before_merge",)
    limits = all.limits.of(asked.pid, asked.abi)
    kernel = Kernel(AddressSpace(), MmState(), all.rules, limits, all.without)
    mapping = Mapping(before.start, before.end, before.flags, before.pgoff)
    if info.magic == SECRETMEM:
        # The memlock limit counts pages that are locked already, which no decision holds.
        kernel.limits = replace(limits, can_lock=True)
        try:
            run_hook(kernel, mapping, FileGiven(info.identity, kind="secretmem", prepare=True))
        except KernelError as error:
            return error.errno, None, tuple(kernel.decided)
        return None, mapping.flags, tuple(kernel.decided)
    if info.ordinary:
        return None, before.flags, ("hook_before_merge",)
    return None, None, ("hook_before_merge",)


def _compare(
    all: Replayer, asked: Decision, made: Sequence[Decision], flags: int | None, rules: tuple[str, ...]
) -> Outcome:
    before, after = asked.descs
    if (after.start, after.end) != (before.start, before.end):
        return _failed("the hook changed the range", rules, _range(before), _range(after))
    if flags is not None and after.flags != flags:
        return _failed("the hook left other flags than expected", rules, _flags(flags), _flags(after.flags))
    changed = before.flags ^ after.flags
    if changed & ~(LEARNABLE | HUGETLB | DONTEXPAND | LOCKED_MASK):
        return _failed("the hook changed flags that are not its own", rules, "", _flags(changed))
    step = _next_step(asked, made)
    if step is not None:
        wrong = _carried_over(after, step, all)
        if wrong:
            return _failed(f"the merge test was not given what the hook left: {wrong}", rules, _range(after), wrong)
    return Outcome(PASSED, "", rules)


def _next_step(asked: Decision, made: Sequence[Decision]) -> Decision | None:
    """The merge test of the mapping whose hook this is; None for a nested hook, and where there was none."""
    if any(each.what == "COMPAT_MMAP" and each.contains(asked) for each in made):
        return None
    later = [each for each in made if each.what == "MERGE_NEW" and each.seq == asked.seq and each.tid == asked.tid]
    return next((each for each in later if each.entered >= asked.time and each.start == asked.descs[0].start), None)


def _carried_over(after: Descriptor, step: Decision, all: Replayer) -> str:
    """Flags, file and page offset of the descriptor are those of the merge test (but for KSM's flag)."""
    ksm = MERGEABLE if all.rules.features["early_ksm_flag"] is not False else 0
    if (after.flags ^ step.flags) & ~ksm:
        return f"flags {_flags(step.flags)}"
    if after.pgoff != step.pgoff:
        return f"page offset {step.pgoff:#x}"
    return "another file" if after.file != step.file else ""


def _compat(all: Replayer, asked: Decision, inner: Sequence[Decision]) -> Outcome:
    """The compatibility layer: what the nested hook left in its descriptor is what the VMA has afterwards."""
    hook = next((each for each in inner if each.what == "MMAP_PREPARE"), None)
    descs = asked.descs if len(asked.descs) == 2 else hook.descs if hook is not None else ()
    if len(descs) != 2:
        return _open("the hook inside the compatibility layer was not seen")
    before, after = descs
    if hook is not None and (hook.error < 0) != (asked.error < 0):
        return _failed("the layer did not return the hook's error", (), str(hook.error), str(asked.error))
    if asked.error < 0:
        return Outcome(PASSED, "", ("compat_layer",))
    entry, result = _row(asked, "source", "middle"), _row(asked, "result", "source")
    if entry is None or result is None or "result" not in asked.rows:
        return _open("the VMA of the compatibility layer was not read")
    if before.flags != entry[2]:
        return _failed(
            "the descriptor is not that of the VMA", ("compat_layer",), _flags(entry[2]), _flags(before.flags)
        )
    if all.rules.features["compat_assigns_flags"] is None and entry[2] & ~after.flags:
        return _open("the kernel's features are not known: compat_assigns_flags")
    assigns = all.rules.has("compat_assigns_flags")
    flags = after.flags if assigns else entry[2] | after.flags
    rules = ("compat_layer",) if assigns else ("compat_layer", "compat_only_adds_flags")
    if result[2] != flags:
        return _failed("the VMA has other flags than the hook left", rules, _flags(flags), _flags(result[2]))
    if result[7] != after.file:
        return _failed("the VMA has another file than the hook left", rules, "", "")
    if result[3] != after.pgoff:
        return _failed("the VMA has another page offset", rules, f"{after.pgoff:#x}", f"{result[3]:#x}")
    return Outcome(PASSED, "", rules)


def _row(asked: Decision, *roles: str) -> Row | None:
    return next((asked.rows[role] for role in roles if role in asked.rows), None)


def _open(reason: str) -> Outcome:
    return Outcome(UNDECIDED, reason)


def _failed(reason: str, rules: tuple[str, ...], expected: str, observed: str) -> Outcome:
    return Outcome(FAILED, reason, rules, (), expected, observed)


def _flags(bits: int) -> str:
    return "|".join(flag_names(bits)) or "none"


def _range(found: Descriptor) -> str:
    return f"[{found.start:#x}, {found.end:#x})"
