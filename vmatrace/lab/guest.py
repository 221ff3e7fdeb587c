"""One guest from power-on to its end: the QEMU command, the watch over it, its console's last words."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmatrace.errors import CannotTrace, escape
from vmatrace.lab import tools
from vmatrace.lab.kernels import Kernel, host_arch
from vmatrace.lab.root import INIT, PARTUUID

UP = b"vmatrace-lab: up"
_POLL_S = 0.05
_CONSOLE_LINES = 15
_PROGRAM = {"x86_64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}
_CONSOLE = {"x86_64": "ttyS0", "arm64": "ttyAMA0"}
_MACHINE = {
    ("x86_64", "kvm"): ["-M", "pc,accel=kvm", "-cpu", "host"],
    # In QEMU 7.2 an interrupt behind an emulated cmpxchg16b leaves wrong flags; the kernel can do without it.
    ("x86_64", "tcg"): ["-M", "pc,accel=tcg", "-cpu", "max,cx16=off"],
    ("arm64", "kvm"): ["-M", "virt,accel=kvm,gic-version=host", "-cpu", "host"],
    ("arm64", "tcg"): ["-M", "virt,accel=tcg", "-cpu", "max,pauth-impdef=on"],
}


@dataclass(frozen=True, slots=True)
class Machine:
    """How a guest is run: ``accel`` is kvm or tcg; ``extra`` is added to the kernel's command line."""

    kernel: Kernel
    accel: str
    cpus: int = 2
    megabytes: int = 3072
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Disks:
    """Files of one run. ``root`` is written only if ``keep``; an ``initrd`` takes its place."""

    root: Path
    job: Path
    out: Path
    console: Path
    keep: bool = False
    initrd: Path | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a guest ended: seconds until user space ran (None: never) and in all.

    ``why``: we killed it, or QEMU refused to run it; empty when it ended by itself.
    """

    up: float | None
    seconds: float
    why: str


def program(arch: str) -> str:
    """The QEMU program that emulates ``arch``."""
    return _PROGRAM[arch]


def may_use_kvm(arch: str) -> bool:
    """Whether this machine offers KVM for guests of ``arch``."""
    return arch == host_arch() and os.access("/dev/kvm", os.R_OK | os.W_OK)


def command(machine: Machine, disks: Disks) -> list[str]:
    """The QEMU command line."""
    arch = machine.kernel.arch
    words = [
        _PROGRAM[arch],
        *_MACHINE[arch, machine.accel],
        "-smp",
        str(machine.cpus),
        "-m",
        str(machine.megabytes),
    ]
    words += [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        f"file:{_plain(disks.console)}",
    ]
    words += ["-kernel", str(machine.kernel.image)]
    line = f"panic=-1 oops=panic quiet console={_CONSOLE[arch]} secretmem.enable=y {machine.extra}"
    if disks.initrd is not None:
        words += ["-initrd", str(disks.initrd), "-device", "virtio-serial-pci"]
        words += [
            "-chardev",
            f"file,id=out,path={_plain(disks.out)}",
            "-device",
            "virtserialport,chardev=out,name=labout",
        ]
        return [*words, "-append", f"rdinit=/{INIT} {line}"]
    drives = (
        ("labroot", disks.root, not disks.keep),
        ("labjob", disks.job, False),
        ("labout", disks.out, False),
    )
    for serial, file, snapshot in drives:
        # werror=report: with a full disk here the guest gets an error; the default would stop it for ever.
        options = f"if=none,id={serial},format=raw,file={_plain(file)},werror=report,discard=unmap"
        words += ["-drive", options + (",snapshot=on" if snapshot else "")]
        words += ["-device", f"nvme,drive={serial},serial={serial}"]
    root = f"root=PARTUUID={PARTUUID} rootwait rootfstype=ext4 rw init=/{INIT}"
    return [*words, "-append", f"{root} {line}"]


def _plain(path: Path) -> str:
    """A path inside a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")


def boot(machine: Machine, disks: Disks, *, up_within: float, timeout: float) -> Ending:
    """Run the guest to its end; kill it when it is not up, or not done, in time. No QEMU is ever left.

    Raises `CannotTrace` where QEMU itself does not start.
    """
    words = command(machine, disks)
    words[0] = tools.find(words[0]) or words[0]
    disks.console.touch()
    begin = time.monotonic()
    said = disks.console.with_suffix(".qemu")
    with said.open("wb") as messages, _started(words, messages.fileno()) as qemu:
        up: float | None = None
        why = ""
        while qemu.poll() is None:
            now = time.monotonic() - begin
            if up is None and UP in disks.console.read_bytes():
                up = now
            if up is None and now > up_within:
                why = f"it was not up after {up_within:.0f} s"
                break
            if up is not None and now - up > timeout:
                why = f"the command took longer than {timeout:g} s"
                break
            time.sleep(_POLL_S)
        seconds = time.monotonic() - begin
    if up is None and UP in disks.console.read_bytes():
        up = seconds
    if qemu.returncode > 0 and up is None:
        words_of = escape(" ".join(said.read_text(errors="replace").split())[-300:])
        why = f"QEMU ended with status {qemu.returncode}: {words_of}"
    return Ending(up, seconds, why)


@contextlib.contextmanager
def _started(words: list[str], messages: int) -> Iterator[subprocess.Popen[bytes]]:
    try:
        qemu = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            preexec_fn=tools.dies_with_parent(),
            start_new_session=True,
        )
    except OSError as error:
        raise CannotTrace(f"{words[0]}: {error.strerror}", "install QEMU, or see `vmatrace lab --help`") from error
    try:
        yield qemu
    finally:
        if qemu.poll() is None:
            qemu.kill()
        qemu.wait()


def last_words(console: Path) -> list[str]:
    """The last lines of a guest's console, safe to print; empty where it never said anything."""
    text = re.sub(r"\x1b(?:\[[0-9;?]*[A-Za-z]|c)", "", console.read_text(errors="replace"))
    lines = [escape(line.rstrip()) for line in text.replace("\r", "").split("\n") if line.strip()]
    return lines[-_CONSOLE_LINES:]
