"""`vmatrace fingerprint`: which rules the running kernel follows, by behaviour and by its BTF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmatrace.cli import common
from vmatrace.errors import UsageError, escape

if TYPE_CHECKING:
    from vmatrace.fingerprint import Comparison

_WORDS = {True: "yes", False: "no", None: "unknown"}
_AGREES = {True: "agree", False: "DISAGREE", None: ""}


def command(output: common.FormatOption = common.Format.table) -> None:
    """Run a dozen tiny programs that show which rules this kernel follows; needs no root and no BPF."""
    from vmatrace import btf
    from vmatrace.errors import VmatraceError
    from vmatrace.fingerprint import compare, observe
    from vmatrace.kernel import FEATURES, nearest_release, read_profile

    if output is common.Format.csv:
        raise UsageError("usage, vmatrace fingerprint: --format is table or json here", "--format json")
    try:
        kernel = btf.load()
    except VmatraceError as error:
        kernel = None
        common.print_warning(f"{error.message}; behaviour alone decides")
    seen = observe()
    compared = compare(seen, kernel)
    profile = read_profile(kernel, seen)
    release, edits = nearest_release(profile.rule_set().features)
    if output is common.Format.json:
        rows = [_row(comparison) for comparison in compared]
        common.print_json(
            {
                "schema": 1,
                "kernel": profile.release,
                "arch": profile.arch,
                "page_size": profile.page_size,
                "rule_set": release + "".join(edits),
                "nearest": release,
                "edits": list(edits),
                "features": [row for row in rows if row["id"] in FEATURES],
                "options": [row for row in rows if row["id"] not in FEATURES],
                "disagreements": [row["id"] for row in rows if row["agrees"] is False],
            }
        )
    else:
        _print_table(compared, release, edits)
    for comparison in compared:
        if comparison.agrees is False:
            common.print_warning(
                f"{comparison.id}: {comparison.behaviour.detector}, but {comparison.described.detector}"
            )


def _row(comparison: Comparison) -> dict[str, Any]:
    return {
        "id": comparison.id,
        "behaviour": comparison.behaviour.value,
        "seen": comparison.behaviour.detector,
        "btf": comparison.described.value,
        "sign": comparison.described.detector,
        "agrees": comparison.agrees,
    }


def _print_table(compared: tuple[Comparison, ...], release: str, edits: tuple[str, ...]) -> None:
    from vmatrace.cli.doctor_view import plain_table

    table = plain_table("feature or option", "behaviour", "BTF", "", "seen")
    for comparison in compared:
        table.add_row(
            comparison.id,
            _WORDS[comparison.behaviour.value],
            _WORDS[comparison.described.value],
            _AGREES[comparison.agrees],
            escape(comparison.behaviour.detector.removeprefix("behaviour: ")),
        )
    console = common.stdout_console()
    console.print(table)
    told = sum(comparison.behaviour.value is not None for comparison in compared)
    disagreeing = sum(comparison.agrees is False for comparison in compared)
    console.print(f"\n{told} of {len(compared)} told by behaviour, {disagreeing} against the kernel's BTF")
    console.print(f"nearest rule set: {release}{''.join(edits)}")
