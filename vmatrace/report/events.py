"""Events of a trace as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmatrace.errors import escape
from vmatrace.timeline.document import FIRST_OLDER

Older = dict[int, str]
"""Names of the VMA objects that are older than the trace, in the order in which they are told of: old1, old2..."""


def render_event(event: dict[str, Any], older: Older) -> str:
    """One event on one line: when, who, what, and the call it happened in. Names are added to ``older``."""
    op = f"#{event['op']}" if event["op"] is not None else ""
    who = f"{event['pid']}" + (f"/{event['tid']}" if event["tid"] != event["pid"] else "")
    words = [f"{event['time'] / 1e9:12.6f}", f"{who:<8}", f"{op:<7}", f"{event['kind']:<8}", _what(event, older)]
    if event["kind"] not in ("anon_vma", "fork", "exec", "exit"):
        words.append("in " + _call(event))
    if event["text"]:
        words.append(escape(event["text"]))
    if event["reasons"]:
        words.append("- " + "; ".join(reason_text(reason) for reason in event["reasons"]))
    return " ".join(word for word in words if word).rstrip()


def _object(identity: int | None, older: Older) -> str:
    if identity is None or identity < FIRST_OLDER:
        return str(identity or "")
    return older.setdefault(identity, f"old{len(older) + 1}")


def _what(event: dict[str, Any], older: Older) -> str:
    kind, name = event["kind"], _object(event["object"], older)
    where = f"{event['start']:x}-{event['end']:x}" if event["start"] is not None else ""
    if kind == "split":
        cut = f"at {event['address']:x}" if event["address"] is not None else ""
        side = f"new object {_object(event['new'], older)} {event['new_side']}" if event["new_side"] else ""
        return f"{cut} of {name}, {side}"
    if kind == "merge":
        victims = ", ".join(_object(victim, older) for victim in event["victims"])
        return f"{where} {event['side'] or ''} survivor {name}" + (f" victims {victims}" if victims else "")
    if kind in ("mmap_prepare", "compat_mmap"):
        return f"{where} {_hook(event)}".strip()
    if kind in ("merge_attempt", "merge_refused"):
        return f"{where} by {event['function']}" if event["function"] else f"{where} (inferred)"
    if kind == "error":
        return str(event["errno"])
    return f"{where} {name}".strip()


def _hook(event: dict[str, Any]) -> str:
    """The file and its hook, and what the hook changed."""
    path = escape(event["file"]["path"] or "(a file that is not described)")
    if not event["function"]:
        return f"{path} (inferred)"
    changed = [f"+{name}" for name in event["set"] or ()] + [f"-{name}" for name in event["cleared"] or ()]
    return " ".join([path, f"by {event['function']}", *changed])


def reason_text(reason: Mapping[str, Any]) -> str:
    """Why a merge attempt was refused: the side, the condition and its rule with the commit that made it."""
    side = f"{reason['side']}: " if reason["side"] else ""
    cited = f" [{reason['rule']}{', ' + reason['commit'] if reason['commit'] else ''}]" if reason["rule"] else ""
    return escape(f"{side}{reason['text']}{cited}")


def _call(event: dict[str, Any]) -> str:
    args = ", ".join(f"{name}={_value(_signed(name, value))}" for name, value in (event["args"] or {}).items())
    result = event["errno"] or (_value(event["result"]) if event["result"] is not None else "?")
    return f"{event['syscall']}({args}) = {result}" if event["args"] else str(event["syscall"])


def _signed(name: str, value: int) -> int:
    """File descriptors are C ints, whatever a register holds above them."""
    return (value & 0xFFFFFFFF ^ 1 << 31) - (1 << 31) if name == "fd" else value


def _value(value: int) -> str:
    return str(value) if -4096 < value < 4096 else f"{value & (1 << 64) - 1:#x}"
