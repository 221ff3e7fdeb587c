"""Fixtures of all suites: what a live test may count on, and what happens where it may not.

A test marked ``live`` needs BPF on the running kernel. Whether that works is found out by trying,
once a run; where it does not, the test is skipped with the reason, and with VMATRACE_REQUIRE_LIVE=1
it fails with it, so that silence never passes for success.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VMATRACE = Path(sys.executable).with_name("vmatrace")


@functools.cache
def why_not_live() -> str | None:
    """The reason why this machine cannot be traced, in one line; None where it can."""
    doctor = subprocess.run(
        [VMATRACE, "doctor"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if doctor.returncode == 0:
        return None
    said = [line for line in doctor.stderr.splitlines() if line.startswith("error:")]
    return said[0] if said else f"vmatrace doctor: exit {doctor.returncode}"


def live_is_required() -> bool:
    """Whether a live test that cannot run counts as failed."""
    return os.environ.get("VMATRACE_REQUIRE_LIVE", "") not in ("", "0")


def pytest_configure() -> None:
    """Undo an ignored SIGINT: a shell script's background job has it, and each program that a test starts inherits it.

    A shell can then not even trap it, and a test of Ctrl-C would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder: what is in live/ or vm/ needs no marker of its own."""
    for item in items:
        for name in ("live", "vm", "bench"):
            if item.path.is_relative_to(ROOT / "tests" / name):
                item.add_marker(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a live test, with the reason, where tracing does not work - or fail it, if told to."""
    if item.get_closest_marker("live") is None:
        return
    reason = why_not_live()
    if reason is not None and live_is_required():
        pytest.fail(f"live tests are required (VMATRACE_REQUIRE_LIVE), but: {reason}", pytrace=False)
    if reason is not None:
        pytest.skip(f"cannot trace here: {reason}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def vmatrace() -> Path:
    """The installed command, beside the interpreter that runs the tests."""
    return VMATRACE
