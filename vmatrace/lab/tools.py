"""Programs of the distribution that the lab drives: found, installed where we may, else named in the hint."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmatrace.errors import CannotTrace
from vmatrace.lab.cache import Say, locked

# Debian's package of each program.
_PACKAGES: Mapping[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "apt-cache": "apt",
}
_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAST_LINES = 3
_PR_SET_PDEATHSIG = 1


def need(programs: Sequence[str], say: Say) -> None:
    """Make sure that all ``programs`` are here; as root, install what is missing. Raises `CannotTrace`."""
    packages = sorted({_PACKAGES[name] for name in programs if find(name) is None})
    if not packages:
        return
    command = "apt-get install --no-install-recommends " + " ".join(packages)
    if os.geteuid() != 0 or find("apt-get") is None or packages == ["apt"]:
        raise CannotTrace(f"lab: not installed here: {', '.join(packages)}", f"as root: {command}")
    say(f"installing {' '.join(packages)}")
    with locked("apt-install", say):
        try:
            _install(packages)
        except CannotTrace as error:
            raise CannotTrace(f"lab: {', '.join(packages)} cannot be installed: {error}", f"try: {command}") from error


def _install(packages: Sequence[str]) -> None:
    """With the package lists at hand first: most of the time they will do."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = [
        "apt-get",
        "-qq",
        "-y",
        "-o",
        "DPkg::Lock::Timeout=300",
        "install",
        "--no-install-recommends",
        *packages,
    ]
    try:
        call(install, environment)
    except CannotTrace:
        call(["apt-get", "-qq", "update"], environment)
        call(install, environment)


def find(program: str) -> str | None:
    """Path of a program, also where a user's PATH lacks the sbin folders."""
    return shutil.which(program) or shutil.which(program, path=_PLACES)


def call(command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> bytes:
    """Run a program to its end, return what it wrote; raise `CannotTrace` with its last words if it fails."""
    program = find(command[0])
    if program is None:
        raise CannotTrace(f"{command[0]}: not installed here", f"install {_PACKAGES.get(command[0], command[0])}")
    done = subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        cwd=cwd,
        check=False,
        preexec_fn=dies_with_parent(),
    )
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "backslashreplace").splitlines()
        words = " | ".join(line.strip() for line in said[-_LAST_LINES:] if line.strip())
        raise CannotTrace(f"{command[0]}: exit status {done.returncode}: {words}")
    return done.stdout


def dies_with_parent() -> Callable[[], None]:
    """For a child to call before exec: it is killed when we die, however that happens."""
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return bind
