"""What works on this machine, found by trying: permission, BTF, bcc, each probe of both layers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmatrace import btf as btf_reader
from vmatrace.btf import Btf
from vmatrace.capture.bcc import Program, load_bcc
from vmatrace.capture.headers import KALLSYMS, function_names, header_tree
from vmatrace.capture.probe_trials import Trial, try_all
from vmatrace.errors import VmatraceError
from vmatrace.kernel.functions import decisions_plan
from vmatrace.kernel.plan import operations_plan

_CAPABILITIES = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24}
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_TRIAL_PROGRAM = "int vmatrace_trial(void *context) { return 0; }\n"
_DISTRIBUTION_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that tracing stands on: ok, not ok, or None for mere information; ``hint`` mends it."""

    name: str
    ok: bool | None
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The checks, and what came of each probe; `blocker` is what stops the operations layer."""

    checks: tuple[Check, ...]
    operations: tuple[Trial, ...]
    decisions: tuple[Trial, ...]

    @property
    def blocker(self) -> Check | None:
        """Why nothing can be traced here; None where the operations layer works."""
        for check in self.checks:
            if check.ok is False:
                return check
        for trial in self.operations:
            if trial.probe.required and not trial.works:
                name = f"{trial.probe.kind} {trial.probe.name or trial.probe.wanted[0]}"
                return Check(name, False, f"{trial.state}: {trial.reason}", _probe_hint(trial))
        return None


def diagnose() -> tuple[Diagnosis, Btf | None]:
    """Tries everything on the running kernel; gives the kernel's BTF too, where it has one."""
    btf, btf_check = _read_btf()
    checks = [_user(), btf_check, _symbols(), _bcc(), *_information()]
    symbols = tuple(function_names())
    diagnosis = Diagnosis(
        tuple(checks),
        try_all(operations_plan(btf), btf),
        try_all(decisions_plan(btf, symbols), btf),
    )
    return diagnosis, btf


def _read_btf() -> tuple[Btf | None, Check]:
    begin = time.perf_counter()
    try:
        btf = btf_reader.load()
    except VmatraceError as error:
        return None, Check("BTF", False, error.message.removeprefix("BTF, "), error.hint)
    took = time.perf_counter() - begin
    if btf.member("mm_struct", "mm_mt") is None:
        return btf, Check("BTF", False, "this kernel keeps no maple trees of VMAs", "use Linux 6.1 or later")
    return btf, Check("BTF", True, f"{btf.source}, {len(btf)} types, read in {took:.2f} s")


def _user() -> Check:
    held = _effective_capabilities()
    missing = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    if held >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1 or not {"CAP_BPF", "CAP_PERFMON"} & set(missing):
        return Check("permission", True, who + (f", without {', '.join(missing)}" if missing else ""))
    hint = "run it as root: sudo vmatrace doctor" if os.geteuid() else "in a container, give it CAP_SYS_ADMIN"
    return Check(
        "permission", False, f"{who}, without {', '.join(missing)}: BPF programs cannot be loaded", hint
    )


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _symbols() -> Check:
    try:
        with KALLSYMS.open("rb") as symbols:
            hidden = all(
                int(line.split(None, 1)[0], 16) == 0 for _, line in zip(range(64), symbols, strict=False)
            )
    except OSError as error:
        return Check("kernel symbols", False, f"{KALLSYMS}: {error.strerror}", "mount /proc")
    if hidden:
        return Check(
            "kernel symbols",
            False,
            f"{KALLSYMS}: addresses are hidden",
            "sysctl kernel.kptr_restrict=1, as root",
        )
    return Check("kernel symbols", True, f"{KALLSYMS}: addresses readable")


def _bcc() -> Check:
    """bcc is tried by compiling and loading a program that does nothing."""
    begin = time.perf_counter()
    before = os.environ.get("BCC_KERNEL_SOURCE")
    try:
        module = load_bcc()
        where = f"{getattr(module, '__version__', '?')} in {Path(str(module.__file__)).parent}"
        with tempfile.TemporaryDirectory(prefix="vmatrace-doctor-") as folder:
            root = header_tree(Path(folder))
            os.environ["BCC_KERNEL_SOURCE"] = str(root)
            program = Program(_TRIAL_PROGRAM, (root,))
            try:
                program.load("vmatrace_trial")
            finally:
                program.close()
    except VmatraceError as error:
        return Check("bcc", False, error.message.removeprefix("bcc: "), error.hint)
    finally:
        if before is None:
            os.environ.pop("BCC_KERNEL_SOURCE", None)
        else:
            os.environ["BCC_KERNEL_SOURCE"] = before
    return Check(
        "bcc", True, f"{where}, compiled and loaded a program in {time.perf_counter() - begin:.2f} s"
    )


def _information() -> Iterator[Check]:
    yield Check("interpreter", None, _interpreter())
    yield Check("lockdown", None, _lockdown())
    yield Check("tracefs", None, _tracefs())


def _interpreter() -> str:
    """Which Python runs this, beside the one that the distribution's bcc is built for."""
    own = os.path.realpath(sys.executable)
    version = ".".join(map(str, sys.version_info[:3]))
    text = f"{sys.prefix if sys.prefix != sys.base_prefix else sys.executable} runs {own} ({version})"
    if own == os.path.realpath(_DISTRIBUTION_PYTHON):
        text += ", which the distribution's bcc is built for"
    else:
        text += f", not {_DISTRIBUTION_PYTHON}: bcc is pure ctypes and was loaded by its path"
    first = shutil.which("python3")
    if first and os.path.realpath(first) != own and sys.prefix != sys.base_prefix:
        text += f"; another python3 is first on PATH: {first}"
    return text


def _lockdown() -> str:
    try:
        text = _LOCKDOWN.read_text()
    except OSError:
        text = _lockdown_in_own_namespace()
    if not text:
        return "not readable (securityfs is not mounted)"
    return text.partition("[")[2].partition("]")[0] or text.strip()


def _lockdown_in_own_namespace() -> str:
    """Mounts securityfs where only this one command sees it; empty text where that is not allowed."""
    script = 'mount -t securityfs securityfs "$1" && cat "$1/lockdown"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(_LOCKDOWN.parent)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


def _tracefs() -> str:
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "tracefs":
            return f"mounted at {where} (not needed)"
    return "not mounted (not needed)"


def _probe_hint(trial: Trial) -> str:
    if trial.state == "missing":
        return "use a kernel with this tracepoint (Linux 6.1 or later, CONFIG_TRACING)"
    if "EPERM" in trial.reason:
        return "run as root, outside a container, without confidentiality lockdown"
    return "see the kernel's log: dmesg | tail"
