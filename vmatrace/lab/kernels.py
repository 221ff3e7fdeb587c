"""Kernels of the lab: which there are, which one a user means, and one fetched into the cache."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmatrace.errors import CannotTrace, UsageError, nearest
from vmatrace.lab import tools
from vmatrace.lab.apt import Apt, Package, apt_for
from vmatrace.lab.cache import (
    Say,
    cache_dir,
    is_intact,
    locked,
    made_whole,
    need_room,
    read_meta,
    sha256,
    write_meta,
)

DEBIAN_ARCH: Mapping[str, str] = {"x86_64": "amd64", "arm64": "arm64"}
# How Debian ends the names of its kernel flavours. `cloud` has all a disk root needs built in.
_ENDINGS: Mapping[tuple[str, str], str] = {
    ("amd64", "cloud"): "cloud-amd64",
    ("amd64", "generic"): "amd64",
    ("arm64", "cloud"): "cloud-arm64",
    ("arm64", "generic"): "arm64",
    ("arm64", "16k"): "arm64-16k",
}
OWN, OWN_IN_MEMORY = "own", "own, root in memory"
FLAVOURS = ("cloud", "generic", "16k")
_FETCH_MEGABYTES = 600
_VMLINUZ = re.compile(r"\./(?:boot/vmlinuz-[^/]+|usr/lib/modules/[^/]+/vmlinuz)")
_OVERLAY = re.compile(r"\./(?:usr/)?lib/modules/[^/]+/kernel/fs/overlayfs/overlay\.ko(?:\.\w+)?")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel. ``version``: upstream's; ``folder``: its place in the cache, None for a user's own."""

    release: str
    version: str
    arch: str
    flavour: str
    package: Package | None
    folder: Path | None
    image: Path
    modules: Path | None = None

    @property
    def needs_ram_root(self) -> bool:
        """Whether the disk's drivers are modules, so that only a root in memory can be mounted."""
        return self.flavour not in ("cloud", OWN)


def host_arch() -> str:
    """This machine's architecture as the lab names it."""
    return {"aarch64": "arm64"}.get(platform.machine(), platform.machine())


def normal_arch(arch: str | None) -> str:
    """x86_64 or arm64 for what the user wrote, this machine's own by default. Raises `UsageError`."""
    if arch is None:
        return host_arch() if host_arch() in DEBIAN_ARCH else "x86_64"
    name = {"amd64": "x86_64", "x86-64": "x86_64", "aarch64": "arm64"}.get(arch, arch)
    if name not in DEBIAN_ARCH:
        raise UsageError(f"--arch {arch}: not supported", "x86_64 or arm64")
    return name


def own_kernel(image: Path, arch: str, modules: Path | None, *, ram_root: bool = False) -> Kernel:
    """A user's own image; without ``ram_root``, NVMe, ext4 and MSDOS partitions must be built in."""
    if not image.is_file():
        raise UsageError(f"{image}: not a file", "give a bzImage (x86_64) or Image (arm64)")
    if modules is not None and not modules.is_dir():
        raise UsageError(f"{modules}: not a folder", "give the folder lib/modules/RELEASE of the kernel")
    flavour = OWN_IN_MEMORY if ram_root else OWN
    return Kernel(image.name, "", arch, flavour, None, None, image.resolve(), modules)


def cached(arch: str | None = None) -> list[Kernel]:
    """Kernels in the cache, oldest version first."""
    found = []
    for folder in (cache_dir() / "kernels").glob("*/*"):
        meta = read_meta(folder)
        if meta is None or folder.name.startswith("unfinished-") or arch not in (None, meta["arch"]):
            continue
        package = Package(**meta["package"])
        found.append(
            Kernel(
                meta["release"],
                meta["version"],
                meta["arch"],
                meta["flavour"],
                package,
                folder,
                folder / "vmlinuz",
            )
        )
    return sorted(found, key=_age)


def available(arch: str, flavour: str, say: Say, *, update: bool = False) -> list[Kernel]:
    """Kernels of one flavour that Debian's archive has now, oldest version first. Raises `CannotTrace`."""
    debian = DEBIAN_ARCH[arch]
    ending = _ENDINGS.get((debian, flavour))
    if ending is None:
        raise UsageError(f"--flavour {flavour}: {arch} has none", "cloud or generic")
    apt = apt_for(debian)
    if update or not apt.is_fresh():
        apt.update(say)
    return _listed(apt, arch, flavour, ending)


def _listed(apt: Apt, arch: str, flavour: str, ending: str) -> list[Kernel]:
    found: dict[str, Kernel] = {}
    # linux-binary sorts first and wins: where it exists, linux-image holds no image.
    name = re.compile(rf"linux-(?:binary|image)-(\d[^-]*(?:-\d+)?-{re.escape(ending)})")
    for package in sorted(apt.packages(rf"^linux-(binary|image)-[0-9].*-{ending}$"), key=lambda p: p.name):
        match = name.fullmatch(package.name)
        if match is None or match[1] in found:
            continue
        folder = cache_dir() / "kernels" / arch / match[1]
        version = package.version.split("-")[0]
        found[match[1]] = Kernel(match[1], version, arch, flavour, package, folder, folder / "vmlinuz")
    return sorted(found.values(), key=_age)


def _age(kernel: Kernel) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", kernel.version)], kernel.release


def resolve(wanted: str, arch: str, flavour: str, say: Say) -> Kernel:
    """The kernel that ``wanted`` names: a release, or a version or its beginning (then the latest of them).

    One that the cache has is taken before any that it has not. Raises `CannotTrace` where there is none.
    """
    here = [kernel for kernel in cached(arch) if kernel.flavour == flavour]
    if matching := [kernel for kernel in here if _matches(kernel, wanted)]:
        return matching[-1]
    there = available(arch, flavour, say)
    if not any(_matches(kernel, wanted) for kernel in there):
        with contextlib.suppress(CannotTrace):  # the index at hand may be old
            there = available(arch, flavour, say, update=True)
    if matching := [kernel for kernel in there if _matches(kernel, wanted)]:
        return matching[-1]
    near = nearest(wanted, _series(there)) or ", ".join(_series(there))
    raise CannotTrace(
        f"kernel {wanted}, {arch} {flavour}: Debian's archive has none",
        f"there is {near}; see `vmatrace lab list`",
    )


def _series(kernels: Iterable[Kernel]) -> list[str]:
    return list(dict.fromkeys(".".join(kernel.version.split(".")[:2]) for kernel in kernels))


def _matches(kernel: Kernel, wanted: str) -> bool:
    return any(
        name == wanted or (name.startswith(wanted) and name[len(wanted)] in ".+-~")
        for name in (kernel.release, kernel.version, kernel.package.version if kernel.package else "")
    )


def fetch_kernel(kernel: Kernel, say: Say) -> Kernel:
    """Make sure that the kernel's image is in the cache and is what was put there. Raises `CannotTrace`."""
    if kernel.folder is None:
        return kernel
    with locked(f"kernel-{kernel.arch}-{kernel.release}", say):
        meta = read_meta(kernel.folder)
        if meta is not None and is_intact(kernel.folder, meta):
            return kernel
        if meta is not None:
            say(f"warning: {kernel.folder} is damaged; fetching it again")
        _fetch_into(kernel, kernel.folder, say)
    return kernel


def _fetch_into(kernel: Kernel, folder: Path, say: Say) -> None:
    assert kernel.package is not None
    apt = apt_for(DEBIAN_ARCH[kernel.arch])
    if not apt.is_fresh():
        apt.update(say)
    need_room(cache_dir(), _FETCH_MEGABYTES, "a kernel package")
    with made_whole(folder) as work:
        package = apt.download(kernel.package, work, say)
        files = _unpack(package, work)
        if "vmlinuz" not in files:
            raise CannotTrace(f"package {package.name}: holds no kernel image", "see `vmatrace lab list` for others")
        if files == ["vmlinuz"]:
            files += _overlay_of(kernel, apt, work, say)
        meta = {
            "release": kernel.release,
            "version": kernel.version,
            "arch": kernel.arch,
            "flavour": kernel.flavour,
            "package": {name: getattr(kernel.package, name) for name in ("name", "version", "suite")},
            "package_sha256": sha256(package),
        }
        package.unlink()
        write_meta(work, meta, files)


def _unpack(package: Path, into: Path) -> list[str]:
    """Take the image, and overlayfs where the package has it, out of a package; return the files' names."""
    program = tools.find("dpkg-deb")
    if program is None:
        raise CannotTrace("dpkg-deb: not installed here", "install dpkg")
    files = []
    with subprocess.Popen([program, "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
                for member in archive:
                    name = _name_of(member)
                    if name is None:
                        continue
                    source = archive.extractfile(member)
                    assert source is not None
                    with (into / name).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                    files.append(name)
        except tarfile.TarError as error:
            raise CannotTrace(f"package {package.name}: {error}", "fetch it again: vmatrace lab fetch") from error
    if unpacker.returncode:
        raise CannotTrace(f"package {package.name}: damaged", "fetch it again: vmatrace lab fetch")
    return files


def _overlay_of(kernel: Kernel, apt: Apt, work: Path, say: Say) -> list[str]:
    """Since 6.19 modules have a package of their own, which the archive may have no longer."""
    for package in apt.packages(f"^linux-modules-{re.escape(kernel.release)}$"):
        file = apt.download(package, work, say)
        files = _unpack(file, work)
        file.unlink()
        return files
    return []


def _name_of(member: tarfile.TarInfo) -> str | None:
    if not member.isreg():
        return None
    if _VMLINUZ.fullmatch(member.name):
        return "vmlinuz"
    if _OVERLAY.fullmatch(member.name):
        return Path(member.name).name
    return None
