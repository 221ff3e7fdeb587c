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

from vmatrace.capture.precheck import check_command, not_executable, not_found
from vmatrace.errors import UsageError
from vmatrace.schema import MISC


@dataclass(slots=True)
class Target:
    """A child process that waits for `release` before it executes its command."""

    pid: int
    pidfd: int
    _gate: int
    _report: int
    command: tuple[str, ...]
    secret: int
    released: bool = False
    _status: int | None = None

    def release(self) -> None:
        """Let the child execute the command. Raises `VmatraceError` (exit 126 or 127) when it cannot."""
        self.released = True
        with contextlib.suppress(BrokenPipeError):  # killed while it waited: its status tells
            os.write(self._gate, b"g")
        os.close(self._gate)
        with open(self._report, "rb") as report:
            said = report.read()
        if not said:
            return
        os.waitpid(self.pid, 0)
        number, name = int(said), self.command[0]
        raise not_found(name) if number in (errno.ENOENT, errno.ENOTDIR) else not_executable(name, number)

    def status(self) -> int | None:
        """Exit status once it has ended (128 + n by signal n), else None."""
        if self._status is None:
            pid, word = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(word)
                self._status = 128 - code if code < 0 else code
        return self._status

    def abandon(self) -> None:
        """End the child where it has not executed anything yet (the recorder failed first)."""
        if not self.released:
            self.released = True
            os.close(self._gate)
            os.close(self._report)
            os.waitpid(self.pid, 0)


def start(command: Sequence[str], user: str | None = None) -> Target:
    """Fork the child for ``command``, run as ``user`` if given; raises what is known to fail already."""
    account = _account(user)
    if account is None:  # another user may see other files
        check_command(command[0])
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
    """A call that tells the BPF side who we are (follow_announced there); all is looked up already."""
    prctl = ctypes.CDLL(None).prctl
    arguments = [ctypes.c_ulong(value) for value in (MISC["ANNOUNCE"], secret, 0, 0, 0)]
    return lambda: prctl(*arguments)


def _run(
    command: Sequence[str],
    account: pwd.struct_passwd | None,
    gate: int,
    report: int,
    announce: Callable[[], None],
) -> None:
    """The child's side; never returns."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
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
