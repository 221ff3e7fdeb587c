"""What can be told to be impossible before anything is compiled, started or written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from vmatrace import btf as kernel_btf
from vmatrace.btf import Btf
from vmatrace.capture.limits import effective_capabilities
from vmatrace.errors import BadTrace, CannotTrace, UsageError, VmatraceError

NOT_EXECUTABLE = 126
NOT_FOUND = 127
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39
_PF_KTHREAD = 0x00200000


def check_possible() -> Btf:
    """The kernel's BTF; raises `CannotTrace` where tracing needs more than this process or kernel has."""
    if os.geteuid() != 0:
        raise CannotTrace("recording: needs root", "run it with sudo")
    held = 2**64 - 1
    with contextlib.suppress(OSError):  # no /proc: trying will tell
        held = effective_capabilities("self")
    if not held >> _CAP_SYS_ADMIN & 1 and not (held >> _CAP_BPF & 1 and held >> _CAP_PERFMON & 1):
        raise CannotTrace(
            "recording: this root has neither CAP_SYS_ADMIN nor CAP_BPF and CAP_PERFMON",
            "run it outside the container, or give the container CAP_SYS_ADMIN",
        )
    try:
        btf = kernel_btf.load()
    except BadTrace as error:  # of the kernel's own: no file of the user's is at fault
        raise CannotTrace(error.message, "`vmatrace doctor` shows what this kernel offers") from error
    if btf.member("mm_struct", "mm_mt") is None:
        raise CannotTrace("this kernel keeps its VMAs in no maple tree", "use Linux 6.1 or later")
    return btf


def check_namespace(what: str) -> None:
    """Raise `CannotTrace` outside the initial PID namespace, whose PIDs are the only ones that BPF tells."""
    with contextlib.suppress(FileNotFoundError):
        if os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE:
            return
    raise CannotTrace(
        f"{what} in a PID namespace: the kernel tells PIDs of the initial one",
        "record from there, or record a command: vmatrace record -- CMD",
    )


def thread_groups(pids: Sequence[int]) -> tuple[int, ...]:
    """The thread groups of the given tasks, each once; raises `UsageError` for what cannot be traced."""
    found: dict[int, None] = {}
    for pid in pids:
        status = _status(pid)
        group = int(status.get("Tgid", "0"))
        if group == os.getpid():
            raise UsageError(f"PID {pid}: is this recorder itself", "name another process, see `ps`")
        if _is_kernel_thread(pid):
            raise UsageError(f"PID {pid}: a kernel thread, which has no address space", "see `ps`")
        if status["State"][:1] in "ZX":
            raise UsageError(f"PID {pid}: has ended already, only its parent has not noticed", "see `ps`")
        found[group] = None
    return tuple(found)


def check_output(path: Path, force: bool) -> None:
    """Raise `UsageError` where a trace surely cannot be made at ``path``; making it decides."""
    if path.is_dir():
        raise UsageError(f"cannot write {path}: is a directory", "name a file with -o")
    if not path.parent.is_dir():
        raise UsageError(
            f"cannot write {path}: no such directory", "create it first, or choose another with -o"
        )
    if not force and (path.is_symlink() or path.is_file()):
        raise UsageError(f"{path} exists already", "choose another name with -o, or add --force")


def check_command(name: str) -> None:
    """Raise `VmatraceError` (exit 126 or 127) where executing ``name`` would surely fail."""
    if "/" not in name:
        if shutil.which(name) is None and shutil.which(name, os.F_OK) is None:
            raise not_found(name)
        return
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise not_found(name) from error
    except OSError:
        return  # executing it will tell
    if stat.S_ISDIR(mode) or not mode & 0o111:
        raise not_executable(name, errno.EISDIR if stat.S_ISDIR(mode) else errno.EACCES)


def not_found(name: str) -> VmatraceError:
    """The error for a command that is not there, or whose interpreter is not."""
    if "/" in name and os.path.isfile(name):
        return VmatraceError(f"{name}: its interpreter is not there", "see its first line (#!)", NOT_FOUND)
    return VmatraceError(
        f"{name or repr(name)}: command not found", "give its path, or check PATH", NOT_FOUND
    )


def not_executable(name: str, number: int) -> VmatraceError:
    """The error for a command that cannot be executed, with the errno of the try."""
    return VmatraceError(f"{name}: {os.strerror(number)}", "is it an executable file?", NOT_EXECUTABLE)


def _status(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        raise no_such_process(pid) from None
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def no_such_process(pid: int) -> UsageError:
    """The error for a PID that is gone."""
    return UsageError(f"PID {pid}: no such process, or it has no address space", "see `ps`")


def _is_kernel_thread(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        raise no_such_process(pid) from None
    return bool(int(fields[6]) & _PF_KTHREAD)
