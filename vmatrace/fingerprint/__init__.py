"""Tells by behaviour which rules the running kernel follows, and sets it beside what its BTF says.

The programs are in `vmatrace.fingerprint.programs`; they run in an interpreter of their own, need neither
root nor BPF, and touch only their own mappings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmatrace.btf import Btf
from vmatrace.errors import VmatraceError, escape
from vmatrace.fingerprint.programs import PROGRAMS
from vmatrace.kernel.detect import Finding, detect, detect_config
from vmatrace.kernel.features import FEATURES
from vmatrace.kernel.profile import KernelProfile, read_profile

_FOLDER = Path(__file__).parent
# The programs fork, so their interpreter stays bare: stand-ins for the two packages keep NumPy out of it.
_BOOT = """
import sys, types
for name in ("vmatrace", "vmatrace.fingerprint"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from vmatrace.fingerprint.programs import main
main(sys.argv[2:])
"""
_CONFIG_PREFIX = "config_"
# Filling an address space takes longer than all other programs together, and BTF has a sign of it.
_SLOW = frozenset({"mremap_count_7_1"})
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Comparison:
    """One feature or option, seen by behaviour and described by BTF; ``agrees`` is None if one is silent."""

    id: str
    behaviour: Finding
    described: Finding

    @property
    def agrees(self) -> bool | None:
        """Whether both evidences say the same."""
        if self.behaviour.value is None or self.described.value is None:
            return None
        return self.behaviour.value == self.described.value


def observe(names: Iterable[str] | None = None) -> Mapping[str, Finding]:
    """Runs the programs (all by default) and gives what each saw, by feature or option id."""
    wanted = list(PROGRAMS) if names is None else list(names)
    command = [sys.executable or "python3", "-I", "-c", _BOOT, str(_FOLDER), *wanted]
    try:
        run = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
        answers = json.loads(run.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise VmatraceError(
            f"fingerprint, {escape(command[0])}: {_reason(error)}",
            "check that this interpreter works: `python3 -c 'import ctypes'`",
        ) from error
    return {
        name.removeprefix(_CONFIG_PREFIX): Finding(answer["value"], "behaviour: " + answer["text"])
        for name, answer in answers.items()
    }


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"ended with status {error.returncode}: {escape(' '.join(last))}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"did not end within {_TIMEOUT_S} s"
    return escape(str(error))


def live_profile(btf: Btf | None = None) -> KernelProfile:
    """The running kernel's profile, from its BTF and from the quick ones of the programs."""
    return read_profile(btf, observe(name for name in PROGRAMS if name not in _SLOW))


def compare(seen: Mapping[str, Finding], btf: Btf | None) -> tuple[Comparison, ...]:
    """What the programs saw beside what BTF says, in the order of the feature table, options last."""
    described = {**detect(btf), **detect_config(btf)}
    silent = Finding(None, "no sign in BTF")
    order = [key for key in FEATURES if key in seen] + [key for key in seen if key not in FEATURES]
    return tuple(Comparison(key, seen[key], described.get(key, silent)) for key in order)
