"""The root file system of guests: Debian with Python, bcc and what vmatrace needs, an image per architecture.

Packages are unpacked, never configured: nothing foreign runs on this machine, and no right of root is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmatrace.errors import CannotTrace
from vmatrace.lab import tools
from vmatrace.lab.apt import keyring, mirror_of
from vmatrace.lab.cache import (
    Say,
    cache_dir,
    is_intact,
    locked,
    made_whole,
    need_room,
    read_meta,
    write_meta,
)
from vmatrace.lab.kernels import DEBIAN_ARCH

SUITE = "trixie"
_PYTHON = "3.13"  # of that suite
SITE = f"usr/local/lib/python{_PYTHON}/dist-packages"
PARTUUID = "1ab0c0de-01"
INIT = "lab-init"

_PACKAGES = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "kmod",
    "libc-bin",
    "login",
    "mawk",
    "mount",
    "netbase",
    "passwd",
    "perl-base",
    "procps",
    "python3",
    "python3-bpfcc",
    "sed",
    "tar",
    "util-linux",
]
# NumPy 2.4 asks for cmpxchg16b, which emulated guests do without (see guest.py).
_WHEELS = ("numpy<2.4", "pyarrow", "rich", "typer")
_GLIBCS = ("_2_39", "_2_34", "_2_31", "_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014")
_MACHINES: Mapping[str, str] = {"x86_64": "x86_64", "arm64": "aarch64"}
# What a package's maintainer scripts would have made.
_LINKS: Mapping[str, str] = {
    "usr/bin/sh": "dash",
    "usr/bin/awk": "mawk",
    "etc/mtab": "../proc/self/mounts",
}
_COPIES: Mapping[str, str] = {
    "usr/share/base-passwd/passwd.master": "etc/passwd",
    "usr/share/base-passwd/group.master": "etc/group",
}
_FOLDERS = ("dev", "proc", "sys", "run", "tmp", "lab", "job", "root", "var/tmp", "etc/ld.so.conf.d")

_SECTOR = 512
START = 2048 * _SECTOR
_FREE = 2 << 30  # what guests may write; nothing of it is stored
_BUILD_MEGABYTES = 3000
IMAGE = "root.img"


@dataclass(frozen=True, slots=True)
class Root:
    """A root image in the cache. ``fresh``: it was made just now and no guest has finished it yet."""

    arch: str
    image: Path
    fresh: bool = False


def init_script() -> str:
    """What runs as PID 1 in the guest."""
    return (Path(__file__).parent / "guest-init.sh").read_text()


def _key() -> str:
    """Changes when anything that shapes the image does."""
    recipe = [SUITE, _PYTHON, _PACKAGES, _WHEELS, dict(_LINKS), dict(_COPIES), _FOLDERS, _FREE, init_script()]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def fetch_root(arch: str, say: Say) -> Root:
    """The root image for ``arch``, built where the cache has none. Raises `CannotTrace`."""
    folder = cache_dir() / "roots" / arch / _key()
    with locked(f"root-{arch}", say):
        meta = read_meta(folder)
        if meta is not None and is_intact(folder, meta):
            return Root(arch, folder / IMAGE, not meta["finished"])
        tools.need(("mmdebstrap", "mke2fs"), say)
        need_room(cache_dir(), _BUILD_MEGABYTES, "a root file system")
        with made_whole(folder) as work:
            _build(arch, work, say)
            write_meta(work, {"arch": arch, "suite": SUITE, "finished": False}, [IMAGE])
    return Root(arch, folder / IMAGE, True)


def replace_with_finished(root: Root, finished: Path, say: Say) -> Root:
    """Put the image that a first guest has finished in the place of ``root``'s."""
    with locked(f"root-{root.arch}", say):
        folder = root.image.parent
        os.replace(finished, root.image)
        write_meta(folder, {"arch": root.arch, "suite": SUITE, "finished": True}, [IMAGE])
    return Root(root.arch, root.image)


def _build(arch: str, work: Path, say: Say) -> None:
    tree = work / "tree"
    tree.mkdir()
    say(f"making a root file system for {arch} guests (once, about a minute)")
    _unpack_debian(arch, work, tree)
    _install_wheels(arch, tree)
    _settle(tree)
    _make_image(tree, work / IMAGE)
    tools.call(["rm", "-rf", str(tree)])


def _unpack_debian(arch: str, work: Path, tree: Path) -> None:
    archive = work / "tree.tar"
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=extract",
        f"--architectures={DEBIAN_ARCH[arch]}",
        f"--include={','.join(_PACKAGES)}",
        f"--keyring={keyring()}",
        "--aptopt=Acquire::Retries 3",
        "--aptopt=Acquire::http::Timeout 30",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        # Nothing is executed in the tree, so the machine need not be able to run its programs.
        "--skip=check/qemu",
        SUITE,
        str(archive),
        f"deb [signed-by={keyring()}] {mirror_of(SUITE)} {SUITE} main",
    ]
    try:
        tools.call(command, {**os.environ, "TMPDIR": str(work)})
    except CannotTrace as error:
        raise CannotTrace(f"root file system, {arch}: {error}", "check the network and the free space") from error
    owner = ["--same-owner", "--numeric-owner"] if os.geteuid() == 0 else ["--no-same-owner"]
    tools.call(["tar", "-xf", str(archive), "-C", str(tree), "--exclude=./dev/*", *owner])
    archive.unlink()


def _install_wheels(arch: str, tree: Path) -> None:
    platforms = [f"--platform=manylinux{glibc}_{_MACHINES[arch]}" for glibc in _GLIBCS]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "-q",
        "install",
        "--no-compile",
    ]
    target = [
        f"--target={tree / SITE}",
        f"--python-version={_PYTHON}",
        "--implementation=cp",
        "--only-binary=:all:",
    ]
    try:
        tools.call([*pip, *target, *platforms, *_WHEELS])
    except CannotTrace as error:
        raise CannotTrace(
            f"Python packages for guests: {error}", "check the network, and that pip works here"
        ) from error
    for part in ("pyarrow/tests", "pyarrow/include", "numpy/_core/tests"):
        tools.call(["rm", "-rf", str(tree / SITE / part)])


def _settle(tree: Path) -> None:
    """Make what the packages' own scripts would have made."""
    for name in _FOLDERS:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name, target in _LINKS.items():
        if not os.path.lexists(tree / name):
            (tree / name).symlink_to(target)
    for source, name in _COPIES.items():
        if (tree / source).exists() and not (tree / name).exists():
            (tree / name).write_bytes((tree / source).read_bytes())
    init = tree / INIT
    init.write_text(init_script())
    init.chmod(0o755)


def _make_image(tree: Path, image: Path) -> None:
    """An ext4 file system behind a partition table whose disk signature gives it a PARTUUID."""
    used = int(subprocess.run(["du", "-s", "--block-size=1M", tree], capture_output=True, check=True).stdout.split()[0])
    size = (used * 115 // 100 << 20) + _FREE
    sectors = size // _SECTOR
    signature, number = (int(part, 16) for part in PARTUUID.split("-"))
    assert number == 1
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", START // _SECTOR, sectors)
    with image.open("wb") as file:
        file.write(struct.pack("<440sIH16s48sH", b"", signature, 0, entry, b"", 0xAA55))
        file.truncate(START + size)
    features = "^has_journal,^metadata_csum,^resize_inode"
    options = f"offset={START},lazy_itable_init=1,root_owner=0:0"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-E", options, "-m", "0", "-N", "120000"]
    tools.call([*command, "-d", str(tree), str(image), f"{size >> 10}k"])
