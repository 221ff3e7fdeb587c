"""A root in memory, for kernels whose disk drivers are modules: the image's files as one initramfs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO

from vmatrace.lab import tools
from vmatrace.lab.root import Root

_TREE = "tree.cpio"


def make_initrd(root: Root, job: Path, folder: Path) -> Path:
    """The files of ``root`` and, behind them, the job: the kernel unpacks one archive after the other."""
    tree = root.image.parent / _TREE
    initrd = folder / "initrd"
    with initrd.open("wb") as target:
        with tree.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 22)
        write_entry(target, "lab-job.tar", 0o100644, job)
        write_end(target)
    return initrd


def tree_of(image: Path, folder: Path) -> Path:
    """Read the files of an image's file system back into a folder."""
    tree = folder / "tree"
    tree.mkdir()
    tools.call(["debugfs", "-R", f"rdump / {tree}", str(image)])
    return tree


def write_entry(target: BinaryIO, name: str, mode: int, source: Path | bytes, inode: int = 0) -> None:
    """One entry of a cpio archive in the `newc` format (Documentation/driver-api/early-userspace)."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    encoded = os.fsencode(name) + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + encoded
    target.write(head + bytes(-len(head) % 4))
    if isinstance(source, Path):
        with source.open("rb") as file:
            shutil.copyfileobj(file, target, 1 << 22)
    else:
        target.write(source)
    target.write(bytes(-size % 4))


def write_end(target: BinaryIO) -> None:
    """The archive's last entry."""
    write_entry(target, "TRAILER!!!", 0, b"")
