"""`vmatrace doctor`: what works on this kernel, which features it has, and what to do about the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vmatrace.cli import common
from vmatrace.errors import CannotTrace, UsageError, escape

LayoutOption = Annotated[
    bool, typer.Option("--layout", help="Show how vm_area_struct lies in memory instead.")
]
BtfOption = Annotated[
    Path | None,
    typer.Option(
        "--btf", metavar="FILE", help="Look at another kernel's BTF, from a file; nothing is tried."
    ),
]

PageOption = Annotated[
    int,
    typer.Option("--page-size", metavar="BYTES", help="Page size for --layout.", show_default="this machine's"),
]


def command(
    layout: LayoutOption = False,
    btf: BtfOption = None,
    page_size: PageOption = 0,
    output: common.FormatOption = common.Format.table,
) -> None:
    """Try what the running kernel allows: layers, probes, features with their commits, limits.

    Exit status 0 where the operations layer works, 3 where nothing can be traced.
    """
    if output is common.Format.csv:
        raise UsageError(
            "usage, vmatrace doctor: --format is table or json here", "vmatrace doctor --format json"
        )
    if layout:
        _show_layout(btf, page_size, output)
    elif btf is not None:
        _show_file(btf, output)
    else:
        _show_machine(output)


def _show_machine(output: common.Format) -> None:
    from vmatrace.capture.diagnosis import diagnose
    from vmatrace.cli import doctor_view as view
    from vmatrace.fingerprint import live_profile

    diagnosis, kernel = diagnose()
    profile = live_profile(kernel)
    if output is common.Format.json:
        data = {"schema": 1, **view.diagnosis_json(diagnosis), **view.profile_json(profile)}
        common.print_json(data)
    else:
        console = common.stdout_console()
        console.print(
            f"Linux {escape(profile.release)}, {profile.arch}, pages of {profile.page_size} bytes\n"
        )
        view.print_all(console, view.diagnosis_text(diagnosis))
        view.print_all(console, view.profile_text(profile))
    blocker = diagnosis.blocker
    if blocker is not None:
        raise CannotTrace(f"{blocker.name}, this machine: {blocker.text}", blocker.hint)
    if view.layer_state(diagnosis.decisions) not in ("works", "partly"):
        common.note(
            "hint: refused merges and mmap_prepare calls are seen on other kernels: vmatrace lab list"
        )
    common.print_next("vmatrace record -- CMD")


def _show_file(file: Path, output: common.Format) -> None:
    from vmatrace import btf as reader
    from vmatrace.cli import doctor_view as view
    from vmatrace.kernel import FEATURES, detect, detect_config
    from vmatrace.kernel.rulesets import nearest_release

    kernel = reader.load(file)
    features, config = detect(kernel), detect_config(kernel)
    release, edits = nearest_release({key: found.value for key, found in features.items()})
    if output is common.Format.json:
        rows = {
            key: {"value": found.value, "detector": found.detector}
            for key, found in {**features, **config}.items()
        }
        common.print_json(
            {"schema": 1, "btf": str(file), "features": rows, "rule_set": release + "".join(edits)}
        )
        return
    console = common.stdout_console()
    console.print(f"{escape(str(file))}: {len(kernel)} types; nearest rule set {release + ''.join(edits)}\n")
    table = view.plain_table("feature", "there", "commit", "detector")
    for key, found in {**features, **config}.items():
        commit = FEATURES[key].commit if key in FEATURES else None
        table.add_row(key, view.YES_NO[found.value], commit.id if commit else "", escape(found.detector))
    console.print(table)


def _show_layout(file: Path | None, page_size: int, output: common.Format) -> None:
    from vmatrace import btf as reader
    from vmatrace.cli import doctor_view as view
    from vmatrace.kernel.layout import struct_layout

    size = page_size or os.sysconf("SC_PAGE_SIZE")
    if size < 4096 or size & (size - 1):
        raise UsageError(f"usage, --page-size {page_size}: not a page size", "say 4096, 16384 or 65536")
    found = struct_layout(reader.load(file), page_size=size)
    if output is common.Format.json:
        data: dict[str, Any] = {"schema": 1, **view.layout_json(found)}
        common.print_json(data)
    else:
        view.print_all(common.stdout_console(), view.layout_text(found))
