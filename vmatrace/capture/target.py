"""Starts the command to be traced: held at the gate until the hooks are armed, its status passed on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import secrets
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmatrace.errors import UsageError, VmatraceError
from vmatrace.schema import MISC

NOT_EXECUTABLE = 126
NOT_FOUND = 127


@dataclass(slots=True)
class Target:
    """A child process that waits for `release` before it executes its command."""

    pid: int
    pidfd: int
    _gate: int
    _report: int
    command: tuple[str, ...]
    secret: int
    _status: int | None = None

    def release(self) -> None:
        """Let the child execute the command. Raises `VmatraceError` (exit 126 or 127) when it cannot."""
        os.write(self._gate, b"g")
        os.close(self._gate)
        with open(self._report, "rb") as report:
            said = report.read()
        if not said:
            return
        os.waitpid(self.pid, 0)
        number = int(said)
        name = self.command[0]
        if number in (errno.ENOENT, errno.ENOTDIR):
            raise VmatraceError(f"{name}: command not found", "give its path, or check PATH", NOT_FOUND)
        raise VmatraceError(f"{name}: {os.strerror(number)}", "is it an executable file?", NOT_EXECUTABLE)

    def status(self) -> int | None:
        """Exit status once it has ended (128 + n by signal n), else None."""
        if self._status is None:
            pid, word = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(word)
                self._status = 128 - code if code < 0 else code
        return self._status

    def abandon(self) -> None:
        """End the child before it executed anything (the recorder failed first)."""
        with contextlib.suppress(OSError):
            os.close(self._gate)
            os.waitpid(self.pid, 0)


def start(command: Sequence[str], user: str | None = None) -> Target:
    """Fork the child for ``command``, run as ``user`` if given."""
    account = _account(user)
    gate_read, gate_write = os.pipe2(os.O_CLOEXEC)
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    secret = secrets.randbits(63) | 1
    announce = _announcer(secret)
    pid = os.fork()
    if pid == 0:
        os.close(gate_write)
        _run(command, account, gate_read, report_write, announce)
    os.close(gate_read)
    os.close(report_write)
    return Target(pid, os.pidfd_open(pid), gate_write, report_read, tuple(command), secret)


def _account(user: str | None) -> pwd.struct_passwd | None:
    if user is None:
        return None
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f"user {user}: not known here", "see `getent passwd`") from None


def _announcer(secret: int) -> Callable[[], None]:
    """A call that tells the BPF side who we are (follow_announced in bpf/operations.c); everything looked up already."""
    prctl = ctypes.CDLL(None).prctl
    arguments = [ctypes.c_ulong(value) for value in (MISC["ANNOUNCE"], secret, 0, 0, 0)]
    return lambda: prctl(*arguments)


def _run(
    command: Sequence[str], account: pwd.struct_passwd | None, gate: int, report: int, announce: Callable[[], None]
) -> None:
    """The child's side; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if os.read(gate, 1) != b"g":
            os._exit(125)
        announce()
        if account is not None:
            os.initgroups(account.pw_name, account.pw_gid)
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            os.environ.update(HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(report, str(error.errno).encode())
    finally:
        os._exit(125)
