"""The error family, and how text from the system is made safe to print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmatrace.errors import BadTrace, CannotTrace, UsageError, VmatraceError, escape, nearest


@pytest.mark.parametrize(
    ("kind", "status"), [(VmatraceError, 1), (UsageError, 2), (CannotTrace, 3), (BadTrace, 4)]
)
def test_each_kind_has_its_exit_status(kind: type[VmatraceError], status: int) -> None:
    error = kind("what, where: why", "one thing")
    assert (error.exit_code, error.message, error.hint, str(error)) == (
        status,
        "what, where: why",
        "one thing",
        "what, where: why",
    )
    assert kind("x", exit_code=125).exit_code == 125


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/lib/libc.so.6", "/lib/libc.so.6"),
        ("a\nb", r"a\012b"),
        ("\x1b[31mred", r"\033[31mred"),
        ("tab\t\x7f", r"tab\011\177"),
        ("c1\x9b2J", r"c1\302\2332J"),
        ("rtl\u202egpj", "rtl\\342\\200\\256gpj"),
        ("line\u2028end", r"line\342\200\250end"),
        (b"\xff\xfe".decode("utf-8", "surrogateescape"), r"\377\376"),
        ("\ud800", r"\355\240\200"),
        ("grün 火", "grün 火"),
        ("", ""),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert escape(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_escaped_can_always_be_printed_on_one_line(text: str) -> None:
    shown = escape(text)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown


def test_nearest_names() -> None:
    assert nearest("copyed_from", ["copied_from", "vmg"]) == "copied_from"
    assert nearest("aab", ["aaa", "aac"]).count(" or ") == 1
    assert nearest("zzz", ["vmg"]) == ""
