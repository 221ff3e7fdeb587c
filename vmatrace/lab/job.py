"""A job as it goes into a guest and comes back: one tar archive each way."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmatrace.errors import CannotTrace, UsageError, VmatraceError
from vmatrace.lab.root import SITE
from vmatrace.resources import bpf_dir

WORK = "job"
_OUT = "lab/out"
_PACKAGE = Path(__file__).resolve().parents[1]
# What Python code finds as /usr/local/bin/vmatrace: the package lies on the path of every python3 there.
_COMMAND = '#!/bin/sh\nexec python3 -m vmatrace "$@"\n'


@dataclass(frozen=True, slots=True)
class Job:
    """A command for a guest. ``put``: (file here, path there); ``get``: patterns there, from its folder /job.

    What comes back goes into the folder ``into``, over existing files only with ``force``.
    """

    command: tuple[str, ...]
    put: tuple[tuple[Path, str], ...] = ()
    get: tuple[str, ...] = ()
    into: Path = field(default_factory=Path)
    force: bool = False


def check(job: Job) -> None:
    """Raise `UsageError` for what cannot be put or taken, before anything is started."""
    for source, _ in job.put:
        if not source.exists():
            raise UsageError(f"--put {source}: no such file", "give a file or folder that exists")
    if not job.into.is_dir():
        raise UsageError(f"{job.into}: not a folder", "create it first")


def pack(job: Job, archive: Path, modules: Path | None = None, overlay: Path | None = None) -> None:
    """Write the archive that the guest's init unpacks at its root."""
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(_PACKAGE, f"{SITE}/vmatrace", filter=_source_only)
        if not (_PACKAGE / "bpf").is_dir():
            tar.add(bpf_dir(), f"{SITE}/vmatrace/bpf", filter=_source_only)
        _add_text(tar, "usr/local/bin/vmatrace", _COMMAND)
        for source, target in job.put:
            tar.add(source.resolve(), target.lstrip("/") if target.startswith("/") else f"{WORK}/{target}")
        if modules is not None:
            tar.add(modules, f"usr/lib/modules/{modules.resolve().name}")
        if overlay is not None:
            tar.add(overlay, f"lab/{overlay.name}")
        _add_text(tar, "lab/run", _run_script(job.command))
        _add_text(tar, "lab/collect", _collect_script(job.get))


def _source_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in member.name:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    data = text.encode()
    member.size, member.mode = len(data), 0o755
    tar.addfile(member, io.BytesIO(data))


def _run_script(command: Sequence[str]) -> str:
    words = " ".join(shlex.quote(word) for word in command)
    overlay = "grep -qw overlay /proc/filesystems || insmod /lab/overlay.ko* 2>/dev/null\n"
    return f"{overlay}cd /{WORK}\n({words}) </dev/null >/{_OUT}/stdout 2>/{_OUT}/stderr\necho $? >/{_OUT}/rc\n"


def _collect_script(patterns: Sequence[str]) -> str:
    """Name each wanted file by its folder and last part, so that the archive has no leading folders."""
    lines = [
        f"cd /{WORK}",
        "set -- -C / " + " ".join(f"{_OUT}/{name}" for name in ("rc", "stdout", "stderr")),
    ]
    for pattern in patterns:
        lines += [
            f"for found in {_glob(pattern)}; do",
            '[ -e "$found" ] || { echo "$found" >>/lab/out/missing; continue; }',
            'set -- "$@" -C "$(realpath "$(dirname "$found")")" "$(basename "$found")"',
            "done",
        ]
    lines += [f'[ -e /{_OUT}/missing ] && set -- "$@" -C / {_OUT}/missing', 'tar -cf "$TARGET" "$@"']
    return "TARGET=$1\n" + "\n".join(lines) + "\n"


def _glob(pattern: str) -> str:
    """Quoted, but for the characters that make it a pattern."""
    return "".join(char if char in "*?[]" else shlex.quote(char) for char in pattern)


@dataclass(slots=True)
class Returned:
    """What came back: the command's exit status, what it said, files written here, and what could not be."""

    status: int
    stdout: bytes
    stderr: bytes
    files: list[Path] = field(default_factory=list)
    trouble: list[VmatraceError] = field(default_factory=list)


def unpack(archive: Path, job: Job) -> Returned | None:
    """Read the archive that the guest wrote; None where it wrote none or only a part."""
    said: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            for member in members:
                if member.isreg() and member.name.startswith(_OUT + "/"):
                    source = tar.extractfile(member)
                    said[member.name.removeprefix(_OUT + "/")] = source.read() if source else b""
            if "rc" not in said:
                return None
            returned = Returned(int(said["rc"]), said.get("stdout", b""), said.get("stderr", b""))
            for name in said.get("missing", b"").decode("utf-8", "backslashreplace").splitlines():
                returned.trouble.append(
                    CannotTrace(f"--get {name}: no such file in the guest", f"its folder is /{WORK}")
                )
            for member in _wanted(members):
                _place(tar, member, job, returned)
    except (tarfile.TarError, ValueError, EOFError):
        return None
    return returned


def _wanted(members: Sequence[tarfile.TarInfo]) -> Iterator[tarfile.TarInfo]:
    for member in members:
        inside = not member.name.startswith((_OUT + "/", "/")) and ".." not in Path(member.name).parts
        if inside and (member.isreg() or member.isdir()):
            yield member


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, job: Job, returned: Returned) -> None:
    """Write one file here; an existing one only with ``force``, and never through a link."""
    target = job.into / member.name
    try:
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            return
        if os.path.lexists(target):
            if not job.force or not stat.S_ISREG(target.lstat().st_mode):
                raise UsageError(f"{target} exists already", "choose another folder with --into, or add --force")
            target.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        assert source is not None
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, member.mode & 0o755 | 0o600), "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        returned.files.append(target)
    except OSError as error:
        returned.trouble.append(CannotTrace(f"{target}: {error.strerror}"))
    except UsageError as error:
        returned.trouble.append(error)
