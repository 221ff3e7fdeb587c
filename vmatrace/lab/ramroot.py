"""A root in memory, for kernels whose disk drivers are modules: the image's files as one initramfs."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from vmatrace.lab import tools
from vmatrace.lab.cache import Say, is_intact, locked, made_whole, need_room, read_meta, write_meta
from vmatrace.lab.root import START, Root

MEGABYTES = 4096
"""Memory that a guest needs to hold its root twice, packed and unpacked."""

_TREE = "tree.cpio"
_BUILD_MEGABYTES = 2500
_CONSOLE = (5, 1)  # the device number of /dev/console, which PID 1 is started with


def make_initrd(root: Root, job: Path, folder: Path, say: Say) -> Path:
    """The files of ``root`` and, behind them, the job: the kernel unpacks one archive after the other."""
    initrd = folder / "initrd"
    with initrd.open("wb") as target:
        with _packed_tree(root, say).open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 22)
        write_entry(target, "lab-job.tar", stat.S_IFREG | 0o644, job)
        write_end(target)
    return initrd


def _packed_tree(root: Root, say: Say) -> Path:
    """The root image's files as a cpio archive, made when a kernel first needs it."""
    place = root.image.parent / "ram"
    with locked(f"root-{root.arch}", say):
        meta = read_meta(place)
        if meta is None or not is_intact(place, meta):
            tools.need(("debugfs",), say)
            need_room(root.image.parent, _BUILD_MEGABYTES, "a root in memory")
            say(f"packing the {root.arch} root file system for memory (once)")
            with made_whole(place) as work:
                tree = work / "tree"
                tree.mkdir()
                tools.call(["debugfs", "-R", f"rdump / {tree}", f"{root.image}?offset={START}"])
                with (work / _TREE).open("wb") as target:
                    write_tree(target, tree)
                shutil.rmtree(tree)
                write_meta(work, {"arch": root.arch}, [_TREE])
    return place / _TREE


def write_tree(target: BinaryIO, tree: Path) -> None:
    """All files, folders and links of ``tree``, owned by root, and a console; ended as an archive."""
    for folder, folders, files in os.walk(tree):
        for name in sorted(folders + files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            entry = str(path.relative_to(tree))
            if stat.S_ISLNK(mode):
                write_entry(target, entry, mode, os.fsencode(path.readlink()))
            elif stat.S_ISDIR(mode):
                write_entry(target, entry, mode, b"")
            elif stat.S_ISREG(mode):
                write_entry(target, entry, mode, path)
    write_entry(target, "dev/console", stat.S_IFCHR | 0o600, b"", _CONSOLE)
    write_end(target)


def write_entry(
    target: BinaryIO, name: str, mode: int, content: Path | bytes, device: tuple[int, int] = (0, 0)
) -> None:
    """One entry of a cpio archive in the kernel's `newc` format; ``content``: a file, or the bytes."""
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    encoded = os.fsencode(name) + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, special device, length of name, checksum
    fields = (0, mode, 0, 0, 1, 0, size, 0, 0, *device, len(encoded), 0)
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + encoded
    target.write(head + bytes(-len(head) % 4))
    if isinstance(content, Path):
        with content.open("rb") as file:
            shutil.copyfileobj(file, target, 1 << 22)
    else:
        target.write(content)
    target.write(bytes(-size % 4))


def write_end(target: BinaryIO) -> None:
    """The archive's last entry."""
    write_entry(target, "TRAILER!!!", 0, b"")
