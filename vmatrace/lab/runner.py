"""Runs a job in a guest: all fetched first, KVM where it works, another try where a boot died early."""

from __future__ import annotations

import contextlib
import platform
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from vmatrace.errors import CannotTrace, VmatraceError
from vmatrace.lab import guest, ramroot, tools
from vmatrace.lab.cache import Say, cache_dir, need_room, run_folder
from vmatrace.lab.guest import Disks, Ending, Machine
from vmatrace.lab.job import Job, Returned, check, pack, unpack
from vmatrace.lab.kernels import Kernel, fetch_kernel
from vmatrace.lab.root import Root, fetch_root, replace_with_finished

_TRIES = 3
_UP_WITHIN = {"kvm": 20.0, "tcg": 120.0}
_RESULT_BYTES = 16 << 30  # a hole in a file until the guest writes there
_RUN_MEGABYTES = 500
_FINISH_S = 900.0
# Run once in a new image: Python then finds its modules compiled, the linker its libraries listed.
_FINISH = (
    "ldconfig; vmatrace record -q -o /tmp/warm.vmat -- true; vmatrace fingerprint --format json; "
    "vmatrace doctor; rm -f /tmp/warm.vmat; true"
)


@dataclass(frozen=True, slots=True)
class Result:
    """How a job went: exit status and output, files brought back, seconds until up and in all."""

    status: int
    stdout: bytes
    stderr: bytes
    files: tuple[Path, ...]
    trouble: tuple[VmatraceError, ...]
    up: float
    seconds: float
    accel: str


def fetch(kernel: Kernel, say: Say) -> tuple[Kernel, Root]:
    """Bring everything into the cache that a run of ``kernel`` needs: afterwards no network is needed."""
    tools.need((guest.program(kernel.arch),), say)
    kernel = fetch_kernel(kernel, say)
    root = fetch_root(kernel.arch, say)
    if root.fresh:
        root = _finish(kernel, root, say)
    return kernel, root


def run(job: Job, machine: Machine, say: Say, *, timeout: float) -> Result:
    """Run ``job`` on ``machine``, after fetching what is missing. Raises `VmatraceError`; leaves no guest.

    ``timeout``: seconds that the command may take. ``machine.accel`` may be ``auto``.
    """
    check(job)
    kernel, root = fetch(machine.kernel, say)
    if kernel.needs_ram_root:
        machine = replace(machine, megabytes=max(machine.megabytes, ramroot.MEGABYTES))
    machine = replace(machine, kernel=kernel)
    need_room(cache_dir(), _RUN_MEGABYTES, "a guest's results")
    with _ended_by_signals():
        return _attempt(job, machine, root, say, timeout)


def _attempt(job: Job, machine: Machine, root: Root, say: Say, timeout: float) -> Result:
    """Boots that die before user space are tried again: nothing of the job ran in them."""
    accels = [machine.accel] if machine.accel != "auto" else _accels(machine.kernel.arch)
    ending, words = Ending(None, 0.0, ""), list[str]()
    for accel in [*accels[:-1], *[accels[-1]] * _TRIES]:
        tried = replace(machine, accel=accel)
        with run_folder() as folder:
            disks = _disks(folder, job, tried, root, say)
            ending = guest.boot(tried, disks, up_within=_UP_WITHIN[accel], timeout=timeout)
            words = guest.last_words(disks.console)
            if ending.up is not None:
                returned = None if ending.why else unpack(disks.out, job)
                if returned is None:
                    _show(words, say)
                    raise _died(machine.kernel, ending)
                return _result(returned, ending, accel)
        why = ending.why or "it died early"
        say(f"warning: {machine.kernel.release} did not come up under {accel}: {why}")
        if accel == "kvm":
            _kvm_mark().write_text(platform.release() + "\n")
        elif ending.why:  # another try may only help where it died by itself
            break
    _show(words, say)
    raise CannotTrace(
        f"kernel {machine.kernel.release}, {machine.kernel.arch}: does not boot: "
        + (ending.why or "it ended before user space"),
        "a kernel needs NVMe, ext4 and MSDOS partitions built in, or --root ram",
    )


def _died(kernel: Kernel, ending: Ending) -> VmatraceError:
    if ending.why:
        return CannotTrace(f"guest {kernel.release}: {ending.why}", "give it longer with --timeout")
    return CannotTrace(f"guest {kernel.release}: ended without a result", "it was killed, or its kernel failed")


def _show(words: list[str], say: Say) -> None:
    """Show what the guest's console said last."""
    for line in words or ["(nothing)"]:
        say(f"console: {line}")


def _result(returned: Returned, ending: Ending, accel: str) -> Result:
    return Result(
        returned.status,
        returned.stdout,
        returned.stderr,
        tuple(returned.files),
        tuple(returned.trouble),
        ending.up or 0.0,
        ending.seconds,
        accel,
    )


def _disks(folder: Path, job: Job, machine: Machine, root: Root, say: Say) -> Disks:
    archive, out = folder / "job.tar", folder / "out.tar"
    kernel = machine.kernel
    overlay = next(iter(kernel.folder.glob("overlay.ko*")), None) if kernel.folder else None
    pack(job, archive, kernel.modules, overlay)
    if kernel.needs_ram_root:
        initrd = ramroot.make_initrd(root, archive, folder, say)
        return Disks(root.image, archive, out, folder / "console", initrd=initrd)
    with out.open("wb") as file:
        file.truncate(_RESULT_BYTES)
    return Disks(root.image, archive, out, folder / "console")


def _finish(kernel: Kernel, root: Root, say: Say) -> Root:
    """Boot a copy of a new image once, its writes kept; if that fails the image works too, only slower."""
    if kernel.needs_ram_root:
        return root
    say("finishing the root file system in a first guest (once)")
    job = Job(("sh", "-c", _FINISH))
    with (
        _ended_by_signals(),
        tempfile.TemporaryDirectory(prefix="unfinished-", dir=root.image.parent) as name,
    ):
        folder = Path(name)
        copy = folder / root.image.name
        tools.call(["cp", "--sparse=always", "--reflink=auto", str(root.image), str(copy)])
        machine = Machine(kernel, "tcg")
        disks = replace(_disks(folder, job, machine, root, say), root=copy, keep=True)
        ending = guest.boot(machine, disks, up_within=_UP_WITHIN["tcg"], timeout=_FINISH_S)
        if ending.up is None or ending.why or unpack(disks.out, job) is None:
            say("warning: the first guest did not finish; guests will start more slowly")
            return root
        return replace_with_finished(root, copy, say)


def _accels(arch: str) -> list[str]:
    """Ways to run a guest, the best first: KVM unless it failed here before with this kernel of ours."""
    mark = _kvm_mark()
    with contextlib.suppress(OSError):
        if mark.read_text().strip() == platform.release():
            return ["tcg"]
    return ["kvm", "tcg"] if guest.may_use_kvm(arch) else ["tcg"]


def _kvm_mark() -> Path:
    return cache_dir() / "kvm-does-not-work"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn the signals that would kill us into an exit that cleans up: no guest, no file is left."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    saved = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def clear_cache() -> int:
    """Remove everything the lab has fetched; return the number of bytes."""
    folder = cache_dir()
    size = sum(file.lstat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return size
