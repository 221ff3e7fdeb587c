"""Debian's package indexes in a private apt state: the machine's own lists and sources stay untouched.

The mirror's address is the one the machine's own package sources name; Debian's keyring vouches for the
indexes and they for each package, all checked by apt itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmatrace.errors import CannotTrace
from vmatrace.lab import tools
from vmatrace.lab.cache import Say, cache_dir, locked, need_room

_SOURCES = Path("/etc/apt")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MAIN_SUITES = ("bookworm", "bookworm-backports", "trixie", "trixie-backports")
_SECURITY_SUITES = ("bookworm-security", "trixie-security")
_INDEX_MEGABYTES = 300


@dataclass(frozen=True, slots=True)
class Package:
    """A package of the index: its name, its version, and the suite that has it."""

    name: str
    version: str
    suite: str


@dataclass(frozen=True, slots=True)
class Apt:
    """A private apt state for the Debian architecture ``arch``."""

    arch: str
    folder: Path

    def options(self) -> list[str]:
        """Options that make any apt program work in this state alone."""
        settings = {
            "Dir::Etc::SourceList": self.folder / "debian.sources",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Parts": "/dev/null",
            "Dir::State": self.folder,
            "Dir::State::Lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder,
            "APT::Architecture": self.arch,
            "APT::Architectures": self.arch,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": 3,
            "Acquire::http::Timeout": 30,
            "Acquire::https::Timeout": 30,
        }
        return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def is_fresh(self) -> bool:
        """Whether the index was ever read."""
        return (self.folder / "updated").exists()

    def update(self, say: Say) -> None:
        """Read the package indexes again. Raises `CannotTrace` where the mirror cannot be reached."""
        tools.need(("apt-get", "apt-cache", "dpkg-deb"), say)
        need_room(cache_dir(), _INDEX_MEGABYTES, "the package index")
        with locked(f"apt-{self.arch}", say):
            for name in ("lists/partial", "archives/partial"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / "status").touch()
            (self.folder / "debian.sources").write_text(_sources_text())
            say(f"reading Debian's package index ({self.arch})")
            try:
                tools.call(["apt-get", *self.options(), "-o", "APT::Update::Error-Mode=any", "-qq", "update"])
            except CannotTrace as error:
                raise CannotTrace(
                    f"package index: {error}", "check the network; kernels in the cache work without it"
                ) from error
            (self.folder / "updated").write_text(f"{time.time():.0f}\n")

    def packages(self, pattern: str) -> Iterator[Package]:
        """Packages whose names match the regular expression ``pattern``, all versions."""
        found = tools.call(["apt-cache", *self.options(), "search", "--names-only", pattern]).decode()
        names = [line.split(" ", 1)[0] for line in found.splitlines()]
        if not names:
            return
        for line in tools.call(["apt-cache", *self.options(), "madison", *names]).decode().splitlines():
            name, version, source = (part.strip() for part in line.split("|"))
            if source.endswith("Packages"):
                yield Package(name, version, source.split()[1].split("/")[0])

    def download(self, package: Package, into: Path, say: Say) -> Path:
        """Fetch a package, verified by apt, and return its file. Raises `CannotTrace`."""
        say(f"fetching {package.name} {package.version} ({package.suite})")
        try:
            tools.call(["apt-get", *self.options(), "-qq", "download", f"{package.name}={package.version}"], cwd=into)
        except CannotTrace as error:
            hint = "check the network and the free space; `vmatrace lab list --update` reads the index again"
            raise CannotTrace(f"package {package.name}: {error}", hint) from error
        return next(into.glob(f"{package.name}_*.deb"))


def apt_for(arch: str) -> Apt:
    """The private state for a Debian architecture name (amd64, arm64)."""
    return Apt(arch, cache_dir() / "apt" / arch)


def mirror_of(suite: str) -> str:
    """Address from which the machine takes Debian's main or security archive."""
    main, security = _mirrors()
    return security if suite in _SECURITY_SUITES else main


def _sources_text() -> str:
    main, security = _mirrors()
    blocks = []
    for uri, suites in ((main, _MAIN_SUITES), (security, _SECURITY_SUITES)):
        blocks.append(
            f"Types: deb\nURIs: {uri}\nSuites: {' '.join(suites)}\nComponents: main\nSigned-By: {keyring()}\n"
        )
    return "\n".join(blocks)


def keyring() -> Path:
    """Debian's archive keys. Raises `CannotTrace` where they are not installed."""
    if not _KEYRING.exists():
        raise CannotTrace(f"{_KEYRING}: not there", "install debian-archive-keyring")
    return _KEYRING


def _mirrors() -> tuple[str, str]:
    """Addresses of Debian's main and security archives, from the machine's own package sources."""
    found = list(_own_sources(_SOURCES))
    main = next((uri for uri, suite in found if "debian" in uri and re.fullmatch(r"[a-z]+(-updates)?", suite)), None)
    security = next((uri for uri, suite in found if suite.endswith("-security") and "debian" in uri), None)
    if main is None:
        raise CannotTrace(
            "package sources, /etc/apt: none of them is a Debian archive",
            "add Debian's archive to the machine's sources, or give your own kernel image with --kernel",
        )
    if security is None:
        # Mirrors keep both archives side by side.
        security = main.rstrip("/") + "-security"
    return main, security


def _own_sources(folder: Path) -> Iterator[tuple[str, str]]:
    """(address, suite) of each binary package source, in both formats that apt reads."""
    parts = sorted((folder / "sources.list.d").glob("*"))
    for path in [folder / "sources.list", *parts]:
        if not path.is_file() or not os.access(path, os.R_OK):
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".sources":
            yield from _deb822(text)
        elif path.suffix == ".list":
            for line in text.splitlines():
                if match := re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)", line.strip()):
                    yield match[1], match[2]


def _deb822(text: str) -> Iterator[tuple[str, str]]:
    for block in re.split(r"\n\s*\n", text):
        lines = "\n".join(line for line in block.splitlines() if not line.startswith("#"))
        fields = {name.lower(): value for name, value in re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", lines, re.M)}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").strip() == "no":
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield uri, suite
