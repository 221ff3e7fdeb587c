"""How a diagnosis is told: states of layers, what blocks tracing, what is lost."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from vmatrace.capture import kernel_calls
from vmatrace.capture.diagnosis import Check, Diagnosis
from vmatrace.capture.probe_trials import Trial, try_all
from vmatrace.cli import doctor_view as view
from vmatrace.kernel import KernelProfile, detect
from vmatrace.kernel.functions import decisions_plan
from vmatrace.kernel.plan import Probe, operations_plan


def trials(layer: str, *states: str, required: bool = False) -> tuple[Trial, ...]:
    made = []
    for number, state in enumerate(states):
        probe = Probe(
            "operations" if layer == "operations" else "decisions",
            "raw tracepoint" if layer == "operations" else "function",
            f"probe{number}",
            (f"probe{number}",),
            f"shows {number}",
            f"instead {number}",
            required,
        )
        made.append(Trial(probe, state, f"EPERM ({state})"))  # type: ignore[arg-type]
    return tuple(made)


def diagnosis(checks: tuple[Check, ...] = (), operations: tuple[Trial, ...] = ()) -> Diagnosis:
    return Diagnosis(checks, operations, trials("decisions", "refused", "missing"))


def text_of(parts: Any) -> str:
    out = io.StringIO()
    view.print_all(Console(file=out, width=200, highlight=False, markup=False), parts)
    return out.getvalue()


@pytest.mark.parametrize(
    ("states", "required", "expected"),
    [
        (("works", "works"), True, "works"),
        (("works", "refused"), False, "partly"),
        (("works", "refused"), True, "refused"),
        (("works", "missing"), True, "missing"),
        (("missing", "missing"), False, "missing"),
        (("refused", "missing"), False, "refused"),
    ],
)
def test_the_state_of_a_layer(states: tuple[str, ...], required: bool, expected: str) -> None:
    assert view.layer_state(trials("operations", *states, required=required)) == expected


def test_the_first_failed_check_blocks() -> None:
    checks = (Check("a", True, "fine"), Check("b", None, "so so"), Check("c", False, "broken", "mend it"))
    found = diagnosis(checks, trials("operations", "works", required=True))
    assert found.blocker == checks[2]
    data = json.loads(json.dumps(view.diagnosis_json(found)))
    assert data["can_trace"] is False
    assert data["blocker"] == {"what": "c", "why": "broken", "hint": "mend it"}
    assert data["layers"]["operations"]["state"] == "unusable"


def test_a_required_probe_that_is_refused_blocks_with_a_hint() -> None:
    found = diagnosis(operations=trials("operations", "works", "refused", required=True))
    assert found.blocker is not None
    assert found.blocker.name == "raw tracepoint probe1"
    assert "run as root" in found.blocker.hint
    missing = diagnosis(operations=trials("operations", "missing", required=True)).blocker
    assert missing is not None
    assert "6.1 or later" in missing.hint


def test_optional_probes_do_not_block() -> None:
    found = diagnosis(operations=trials("operations", "works", "refused"))
    assert found.blocker is None
    shown = text_of(view.diagnosis_text(found))
    assert "layer operations: partly (1 of 2 probes)" in shown
    assert "layer decisions: refused (0 of 2 probes)" in shown
    assert "shows 0" in shown
    assert "instead 0" in shown


def test_names_from_the_system_cannot_move_the_cursor() -> None:
    shown = text_of(view.diagnosis_text(diagnosis((Check("bcc", True, "in /tmp/\x1b[2Jevil"),))))
    assert "\x1b" not in shown
    assert r"\033[2Jevil" in shown


def test_features_are_shown_with_commit_and_detector() -> None:
    profile = KernelProfile("7.0", "x86_64", 4096, detect(None))
    shown = text_of(view.profile_text(profile))
    assert "879bca0a2c4f" in shown
    assert "unknown" in shown
    data = view.profile_json(profile)
    row = next(row for row in data["kernel"]["features"] if row["id"] == "sticky_flags")
    assert row["commit"] == 'Linux kernel commit 64212ba02e66 ("mm: implement sticky VMA flags") (in v6.19)'
    assert row["value"] is None


def test_what_is_not_in_the_kernel_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object) -> int:
        raise AssertionError("tried")

    monkeypatch.setattr(kernel_calls, "_bpf", forbidden)
    absent = [probe for probe in decisions_plan(None, []) if not probe.name]
    assert absent
    assert {trial.state for trial in try_all(absent, None)} == {"missing"}


def test_another_machine_is_told_by_its_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_calls.platform, "machine", lambda: "vax")
    first, *_ = try_all(operations_plan(None), None)
    assert first.state == "refused"
    assert first.reason == "ENOSYS (no call numbers for vax)"
