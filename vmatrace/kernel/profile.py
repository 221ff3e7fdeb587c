"""What is known of one kernel: release, machine, features with their detectors, options and limits.

A profile is stored in every trace, so a trace can be judged on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vmatrace.btf import KERNEL_BTF, Btf, load
from vmatrace.errors import BadTrace
from vmatrace.kernel.detect import Finding, detect, detect_config
from vmatrace.kernel.features import FEATURES
from vmatrace.kernel.rulesets import RuleSet

_DEFAULT_STACK_GUARD_GAP = 256
# Limits that decide layouts: file below /proc/sys, by the name they have in a profile.
_SYSCTLS = {
    "max_map_count": "vm/max_map_count",
    "overcommit_memory": "vm/overcommit_memory",
    "overcommit_ratio": "vm/overcommit_ratio",
    "overcommit_kbytes": "vm/overcommit_kbytes",
    "mmap_min_addr": "vm/mmap_min_addr",
    "legacy_va_layout": "vm/legacy_va_layout",
    "randomize_va_space": "kernel/randomize_va_space",
    "unprivileged_userfaultfd": "vm/unprivileged_userfaultfd",
}


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """One kernel as the recorder found it; the recorder adds the ``probes`` it used.

    ``config`` are build-time options, ``limits`` numbers of the running system (``stack_guard_gap`` in
    pages, ``personality`` the recorder's own), ``thp`` the system-wide choice. A value of None is unknown.
    """

    release: str
    arch: str
    page_size: int
    features: Mapping[str, Finding]
    config: Mapping[str, Finding] = field(default_factory=dict)
    limits: Mapping[str, int | None] = field(default_factory=dict)
    thp: str = ""
    btf_digest: str = ""
    probes: Mapping[str, str] = field(default_factory=dict)

    def rule_set(self) -> RuleSet:
        """The rule set ``auto``: the features of this very kernel."""
        values = {key: self.features[key].value if key in self.features else None for key in FEATURES}
        return RuleSet("auto", MappingProxyType(values), "measured")

    def with_probes(self, probes: Mapping[str, str]) -> KernelProfile:
        """The same profile with the probes that a recording used, by name, each with its state."""
        return replace(self, probes=dict(probes))

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        return {
            "release": self.release,
            "arch": self.arch,
            "page_size": self.page_size,
            "features": _findings_to_dict(self.features),
            "config": _findings_to_dict(self.config),
            "limits": dict(self.limits),
            "thp": self.thp,
            "btf_digest": self.btf_digest,
            "probes": dict(self.probes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelProfile:
        """The profile that `to_dict` gave; raises `BadTrace` where it is none.

        Features of newer versions are kept, those that an older one did not know are unknown.
        """
        try:
            return cls(
                release=str(data["release"]),
                arch=str(data["arch"]),
                page_size=_page_size(data["page_size"]),
                features=_findings_from_dict(data["features"]),
                config=_findings_from_dict(data.get("config", {})),
                limits={str(k): None if v is None else int(v) for k, v in data.get("limits", {}).items()},
                thp=str(data.get("thp", "")),
                btf_digest=str(data.get("btf_digest", "")),
                probes={str(k): str(v) for k, v in data.get("probes", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadTrace(
                f"kernel profile: damaged ({type(error).__name__}: {error})", "record the trace again"
            ) from error


def read_profile(btf: Btf | None = None, behaviour: Mapping[str, Finding] | None = None) -> KernelProfile:
    """The profile of the running kernel, from its BTF and the system's files.

    ``behaviour`` are findings from running small programs (`vmatrace.fingerprint`): they win where the
    BTF is silent or says otherwise, since they show what the kernel does.
    """
    if btf is None and KERNEL_BTF.exists():
        btf = load()
    features, config = dict(detect(btf)), dict(detect_config(btf))
    for key, finding in (behaviour or {}).items():
        table = features if key in FEATURES else config
        table[key] = _combine(finding, table.get(key))
    return KernelProfile(
        release=_text("/proc/sys/kernel/osrelease") or "unknown",
        arch=os.uname().machine,
        page_size=os.sysconf("SC_PAGE_SIZE"),
        features=MappingProxyType(features),
        config=MappingProxyType(config),
        limits=MappingProxyType(_limits()),
        thp=_chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        btf_digest=btf.digest if btf is not None else "",
    )


def _combine(seen: Finding, described: Finding | None) -> Finding:
    if described is None or described.value is None:
        return seen
    if seen.value is None or seen.value == described.value:
        return described
    return Finding(seen.value, f"{seen.detector}; against {described.detector}")


def _limits() -> dict[str, int | None]:
    limits: dict[str, int | None] = {
        name: _number(_text(f"/proc/sys/{path}")) for name, path in _SYSCTLS.items()
    }
    limits["stack_guard_gap"] = _stack_guard_gap(_text("/proc/cmdline"))
    limits["personality"] = _number(_text("/proc/self/personality"), 16)
    return limits


def _stack_guard_gap(command_line: str) -> int:
    """Pages kept free below a stack: only the kernel's command line can change it."""
    for word in command_line.split():
        name, _, value = word.partition("=")
        if name == "stack_guard_gap" and value.isdigit():
            return int(value)
    return _DEFAULT_STACK_GUARD_GAP


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str, base: int = 10) -> int | None:
    try:
        return int(text, base)
    except ValueError:
        return None


def _chosen(text: str) -> str:
    """The word in brackets of ``always [madvise] never``."""
    return text.partition("[")[2].partition("]")[0]


def _page_size(value: Any) -> int:
    size = int(value)
    if size < 4096 or size & (size - 1):
        raise ValueError(f"page size {size}")
    return size


def _findings_to_dict(findings: Mapping[str, Finding]) -> dict[str, Any]:
    return {key: {"value": found.value, "detector": found.detector} for key, found in findings.items()}


def _findings_from_dict(data: Mapping[str, Any]) -> dict[str, Finding]:
    findings = {}
    for key, entry in data.items():
        value = entry["value"]
        if value not in (True, False, None):
            raise ValueError(f"feature {key} is {value!r}")
        findings[str(key)] = Finding(value if value is None else bool(value), str(entry["detector"]))
    return findings
