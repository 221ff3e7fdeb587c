"""How `vmatrace doctor` looks: a diagnosis, features and limits as JSON values and as rich tables.

Pure: objects in, values or renderables out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from vmatrace.errors import escape
from vmatrace.kernel import FEATURES, KernelProfile, nearest_release

if TYPE_CHECKING:
    from vmatrace.capture.diagnosis import Diagnosis
    from vmatrace.capture.probe_trials import Trial
    from vmatrace.kernel.layout import StructLayout

YES_NO = {True: "yes", False: "no", None: "unknown"}
_STATES = {True: "ok", False: "no", None: ""}


def rule_set_name(profile: KernelProfile) -> str:
    """The nearest named release with the edits that lead from it to this kernel."""
    release, edits = nearest_release(profile.rule_set().features)
    return release + "".join(edits)


def diagnosis_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON values."""
    blocker = diagnosis.blocker
    return {
        "can_trace": blocker is None,
        "blocker": None
        if blocker is None
        else {"what": blocker.name, "why": blocker.text, "hint": blocker.hint},
        "checks": [
            {"name": check.name, "ok": check.ok, "text": check.text, "hint": check.hint}
            for check in diagnosis.checks
        ],
        "layers": {
            name: {"state": state, "probes": [_probe_json(trial) for trial in trials]}
            for name, state, trials in _layers(diagnosis)
        },
    }


def _probe_json(trial: Trial) -> dict[str, Any]:
    return {
        "kind": trial.probe.kind,
        "name": trial.probe.name or None,
        "wanted": list(trial.probe.wanted),
        "symbol": trial.probe.symbol or None,
        "state": trial.state,
        "reason": trial.reason,
        "shows": trial.probe.shows,
        "lost_without": trial.probe.lost,
    }


def profile_json(profile: KernelProfile) -> dict[str, Any]:
    """The kernel's profile as JSON values, each feature with its commit."""
    data = profile.to_dict()
    data["features"] = [
        {
            "id": key,
            "value": profile.features[key].value,
            "detector": profile.features[key].detector,
            "summary": feature.summary,
            "since": feature.since,
            "commit": None if feature.commit is None else str(feature.commit),
        }
        for key, feature in FEATURES.items()
    ]
    return {"kernel": data, "rule_set": rule_set_name(profile)}


def layout_json(layout: StructLayout) -> dict[str, Any]:
    """A struct's layout as JSON values."""
    commit = FEATURES["vma_layout_packed"].commit
    return {
        "struct": layout.name,
        "size": layout.size,
        "cache_line": layout.line_size,
        "cache_lines": layout.lines,
        "members": [
            {
                "offset": row.offset,
                "size": row.size,
                "name": row.name,
                "type": row.type_name,
                "line": row.line,
            }
            for row in layout.rows
            if row.name
        ],
        "holes": [{"offset": row.offset, "size": row.size} for row in layout.holes],
        "objects_per_page": layout.objects_per_page,
        "pages_per_1000": layout.pages_per_1000,
        "bytes_per_1000": layout.bytes_per_1000,
        "commit": None if commit is None else str(commit),
    }


def layer_state(trials: tuple[Trial, ...]) -> str:
    """``works``, ``partly`` or what stops it: ``refused`` or ``missing``."""
    working = sum(trial.works for trial in trials)
    if working == len(trials):
        return "works"
    needed = [trial for trial in trials if trial.probe.required and not trial.works]
    if working and not needed:
        return "partly"
    return "refused" if any(trial.state == "refused" for trial in trials) else "missing"


def _layers(diagnosis: Diagnosis) -> Iterator[tuple[str, str, tuple[Trial, ...]]]:
    """Each layer with its state: both read offsets from BTF and need bcc, so a blocker stops both."""
    blocker = diagnosis.blocker
    for name, trials in (("operations", diagnosis.operations), ("decisions", diagnosis.decisions)):
        yield name, layer_state(trials) if blocker is None else "unusable", trials


def diagnosis_text(diagnosis: Diagnosis) -> Iterator[Table | Text]:
    """The checks and the layers as tables and lines."""
    table = plain_table("", "check", "what was found")
    for check in diagnosis.checks:
        table.add_row(_STATES[check.ok], check.name, escape(check.text))
    yield table
    for name, state, trials in _layers(diagnosis):
        yield from _layer_text(name, state, trials)


def _layer_text(name: str, state: str, trials: tuple[Trial, ...]) -> Iterator[Table | Text]:
    working = sum(trial.works for trial in trials)
    yield Text(f"\nlayer {name}: {state} ({working} of {len(trials)} probes)", style="bold")
    groups: dict[tuple[str, str], list[str]] = {}
    for trial in trials:
        probe = trial.probe
        groups.setdefault((trial.state, trial.reason), []).append(probe.name or " or ".join(probe.wanted))
    table = plain_table("state", "why", "probes")
    for (outcome, reason), names in groups.items():
        table.add_row(outcome, reason, " ".join(names))
    yield table
    lost: dict[str, list[str]] = {}
    for trial in trials:
        if not trial.works:
            lost.setdefault(trial.probe.lost, []).append(trial.probe.shows)
    if lost:
        table = plain_table("lost without them", "what stands in for it")
        for instead, shown in lost.items():
            table.add_row("; ".join(dict.fromkeys(shown)), instead)
        yield Text("")
        yield table


def profile_text(profile: KernelProfile) -> Iterator[Table | Text]:
    """Features, options and limits as tables and lines."""
    yield Text(f"\nfeatures: nearest rule set {rule_set_name(profile)}", style="bold")
    table = plain_table("feature", "here", "since", "commit", "detector")
    for key, feature in FEATURES.items():
        found = profile.features[key]
        commit = "" if feature.commit is None else feature.commit.id
        table.add_row(key, YES_NO[found.value], feature.since, commit, escape(found.detector))
    yield table
    options = ", ".join(f"{key} {YES_NO[found.value]}" for key, found in profile.config.items())
    yield Text(f"\noptions: {options}" + (f"; THP is {profile.thp}" if profile.thp else ""))
    known = (f"{key} {value}" for key, value in profile.limits.items() if value is not None)
    yield Text("limits: " + ", ".join(known))


def layout_text(layout: StructLayout) -> Iterator[Table | Text]:
    """A struct's layout as a table, a rule between cache lines."""
    yield Text(
        f"\n{layout.name}: {layout.size} bytes, {layout.lines} cache lines of {layout.line_size} bytes",
        style="bold",
    )
    table = plain_table("line", "offset", "size", "member", "type")
    for row, next_row in zip(layout.rows, (*layout.rows[1:], None), strict=True):
        last = next_row is not None and next_row.line != row.line
        name = row.name or "(hole)"
        cells = (str(row.line), str(row.offset), str(row.size), name, row.type_name)
        table.add_row(*cells, end_section=last)
    yield table
    unused = sum(row.size for row in layout.holes)
    yield Text(f"{len(layout.holes)} holes, {unused} bytes unused in each object")
    yield Text(
        f"1,000 VMAs: {1000 * layout.size:,} bytes, {layout.bytes_per_1000:,} with the rest of their pages"
        f" ({layout.pages_per_1000} pages of {layout.page_size}, {layout.objects_per_page} objects in each)"
    )
    starts = {row.name: row.offset for row in layout.rows}
    packed = starts.get("shared", 0) > starts.get("vm_file", 0)
    yield Text(
        f"{'packed as' if packed else 'not packed as'} by {FEATURES['vma_layout_packed'].commit},"
        " which takes a usual configuration with per-VMA locks from 4 cache lines to 3"
    )


def plain_table(*headings: str) -> Table:
    """A table without lines, whose cells fold."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_all(console: Any, parts: Iterable[Table | Text]) -> None:
    """Write the parts one after the other."""
    for part in parts:
        console.print(part)
