"""The lab's cache folder: locks between labs, folders made whole or not at all, checksums, free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmatrace.errors import CannotTrace

Say = Callable[[str], None]

_UNFINISHED = "unfinished-"
_META = "meta.json"


def cache_dir() -> Path:
    """The lab's folder below XDG_CACHE_HOME (default ~/.cache), created for its owner."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmatrace" / "lab"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotTrace(
            f"lab cache, {folder}: {error.strerror}", "set XDG_CACHE_HOME to a folder of yours"
        ) from error
    return folder


@contextlib.contextmanager
def locked(name: str, say: Say) -> Iterator[None]:
    """Hold the lock ``name`` of the cache: of two labs that want to make the same thing, one waits."""
    path = cache_dir() / f"{name}.lock"
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another lab that holds {path.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def made_whole(final: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes ``final`` when the block ends well and disappears otherwise.

    To be used with a lock that covers ``final``: what a killed lab left beside it is removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f"{_UNFINISHED}{final.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{final.name}-", dir=final.parent))
    try:
        yield work
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work, final)
    except OSError as error:
        raise _disk_error(error, final) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for the files of one run, removed at its end; what killed labs left is removed first."""
    runs = cache_dir() / "runs"
    runs.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        with locked("runs", lambda text: None):
            for left in runs.iterdir():
                with contextlib.suppress(OSError), (left / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=runs)))
            fcntl.flock(held.enter_context((folder / "lock").open("a")), fcntl.LOCK_EX)
        yield folder


def _disk_error(error: OSError, where: Path) -> CannotTrace:
    hint = "free some space there, or set XDG_CACHE_HOME" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return CannotTrace(f"lab cache, {where}: {error.strerror or error}", hint)


def need_room(folder: Path, megabytes: int, what: str) -> None:
    """Raise `CannotTrace` unless ``folder`` has that much free space."""
    free = shutil.disk_usage(folder).free >> 20
    if free < megabytes:
        raise CannotTrace(
            f"{folder}: {free} MB free, {what} needs {megabytes} MB", "free some space, or set XDG_CACHE_HOME"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_meta(folder: Path, meta: dict[str, Any], files: list[str]) -> None:
    """Write what ``folder`` holds: ``meta`` and size, time and digest of each of ``files``."""
    described = {}
    for name in files:
        status = (folder / name).stat()
        described[name] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256(folder / name),
        }
    text = json.dumps({**meta, "files": described}, indent=1, sort_keys=True)
    (folder / _META).write_text(text + "\n")


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What ``folder`` says it holds; None where nothing whole is there."""
    try:
        meta = json.loads((folder / _META).read_text())
        for name in meta["files"]:
            (folder / name).stat()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(meta)


def is_intact(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether each file has its size and digest; an unchanged time stamp spares reading a large one."""
    for name, wanted in meta["files"].items():
        status = (folder / name).stat()
        if status.st_size != wanted["size"]:
            return False
        unread = status.st_size > 1 << 27 and status.st_mtime_ns == wanted["mtime_ns"]
        if not unread and sha256(folder / name) != wanted["sha256"]:
            return False
    return True
