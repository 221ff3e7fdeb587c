"""``vmatrace lab``: a command on another kernel, in a guest; and the kernels for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmatrace.cli import common
from vmatrace.errors import UsageError

if TYPE_CHECKING:
    from vmatrace.lab import Kernel

app = typer.Typer(
    no_args_is_help=True,
    help="Run a command on another kernel, in a guest that has this vmatrace in it.\n\n"
    "Kernels are Debian's packages, or your own image; QEMU runs them, with KVM where it works. "
    "What is fetched stays in ~/.cache/vmatrace/lab.",
)

KernelOption = Annotated[
    str,
    typer.Option("--kernel", "-k", help="6.16, 6.12.107, a Debian release, or the file of an image."),
]
ArchOption = Annotated[str | None, typer.Option("--arch", help="x86_64 or arm64; default: this machine's.")]
FlavourOption = Annotated[str, typer.Option("--flavour", help="Debian's flavour: cloud, generic, or 16k (arm64).")]
ModulesOption = Annotated[
    Path | None, typer.Option("--modules", help="With your own image: its folder lib/modules/RELEASE.")
]


@app.command("run", short_help="Run a command in a guest.", context_settings={"allow_interspersed_args": False})
def run_command(
    words: Annotated[list[str], typer.Argument(metavar="-- CMD [ARGS]...", help="The command; vmatrace is there.")],
    kernel: KernelOption,
    arch: ArchOption = None,
    flavour: FlavourOption = "cloud",
    put: Annotated[
        list[str] | None,
        typer.Option("--put", metavar="FILE[:PATH]", help="Copy into the guest's folder /job, or to PATH."),
    ] = None,
    get: Annotated[
        list[str] | None,
        typer.Option("--get", metavar="PATH", help="Bring back; patterns as *.vmat are from /job."),
    ] = None,
    into: Annotated[Path, typer.Option("--into", help="Folder for what --get brings back.")] = Path(),
    force: Annotated[bool, typer.Option(help="Overwrite files that --get brings back.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that the command may take.")] = 600.0,
    cpus: Annotated[int, typer.Option(min=1, max=64, help="Processors of the guest.")] = 2,
    memory: Annotated[int, typer.Option(min=256, help="Megabytes of memory of the guest.")] = 3072,
    accel: Annotated[str, typer.Option(help="auto, kvm or tcg (emulation).")] = "auto",
    append: Annotated[str, typer.Option(help="Added to the kernel's command line.")] = "",
    modules: ModulesOption = None,
    root: Annotated[str, typer.Option(help="disk, or ram for your own image without built-in disk drivers.")] = "disk",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and warnings.")] = False,
) -> int:
    """Run a command on another kernel; its output and exit status become ours."""
    from vmatrace.lab import Job, run
    from vmatrace.lab.guest import Machine

    if root not in ("disk", "ram"):
        raise UsageError(f"--root {root}: not known", "disk or ram")
    if accel not in ("auto", "kvm", "tcg"):
        raise UsageError(f"--accel {accel}: not known", "auto, kvm or tcg")
    say = _sayer(quiet)
    job = Job(tuple(words), tuple(_put(text) for text in put or ()), tuple(get or ()), into, force)
    machine = Machine(_kernel(kernel, arch, flavour, modules, root == "ram", quiet), accel, cpus, memory, append)
    say(f"booting {machine.kernel.release} ({machine.kernel.arch})")
    result = run(job, machine, say, timeout=timeout)
    for data, stream in ((result.stderr, sys.stderr), (result.stdout, sys.stdout)):
        stream.flush()
        stream.buffer.write(data)
        stream.flush()
    for trouble in result.trouble:
        common.print_error(trouble.message, trouble.hint)
    for file in result.files:
        say(f"brought back {file}")
    times = f"up after {result.up:.1f} s, {result.seconds:.1f} s in all ({result.accel})"
    say(f"guest: {times}, exit status {result.status}")
    return result.status


@app.command("list", short_help="Kernels in the cache, and those that can be fetched.")
def list_command(
    arch: ArchOption = None,
    flavour: FlavourOption = "cloud",
    everything: Annotated[
        bool, typer.Option("--all", help="Every version, not only the latest of each series.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Read the package index again.")] = False,
    output: common.FormatOption = common.Format.table,
) -> None:
    """List kernels: those in the cache, and the latest of each series that Debian's archive has."""
    from vmatrace.errors import VmatraceError
    from vmatrace.lab import available, cached
    from vmatrace.lab.kernels import normal_arch

    name = normal_arch(arch)
    here = {kernel.release: kernel for kernel in cached(name)}
    there: list[Kernel] = []
    try:
        there = available(name, flavour, _sayer(False), update=update)
    except VmatraceError as error:
        if isinstance(error, UsageError) or update or not here:
            raise
        common.print_warning(f"{error.message}; only the cache is listed")
    latest = {_series(kernel): kernel.release for kernel in there}
    shown = {kernel.release: kernel for kernel in there if everything or kernel.release in latest.values()}
    rows = [_row(kernel, kernel.release in here) for kernel in {**here, **shown}.values()]
    rows.sort(key=lambda row: [int(part) for part in row["version"].split(".") if part.isdigit()])
    _print(rows, output)


@app.command("fetch", short_help="Bring a kernel and a root file system into the cache.")
def fetch_command(kernel: KernelOption, arch: ArchOption = None, flavour: FlavourOption = "cloud") -> None:
    """Fetch what a run of this kernel needs, so that it works without a network."""
    from vmatrace.lab import fetch

    say = _sayer(False)
    fetched, root = fetch(_kernel(kernel, arch, flavour, None, False, False), say)
    say(f"{fetched.release} ({fetched.arch}): {fetched.image}")
    say(f"root file system: {root.image}")
    common.print_next(f"vmatrace lab run --kernel {kernel} --arch {fetched.arch} -- uname -a")


def _kernel(kernel: str, arch: str | None, flavour: str, modules: Path | None, ram_root: bool, quiet: bool) -> Kernel:
    from vmatrace.lab import own_kernel, resolve
    from vmatrace.lab.kernels import FLAVOURS, normal_arch

    if flavour not in FLAVOURS:
        raise UsageError(f"--flavour {flavour}: not known", ", ".join(FLAVOURS))
    if "/" in kernel or Path(kernel).is_file():
        return own_kernel(Path(kernel), normal_arch(arch), modules, ram_root=ram_root)
    if modules is not None or ram_root:
        raise UsageError("--modules, --root ram: only with your own kernel image", "leave it out")
    return resolve(kernel, normal_arch(arch), flavour, _sayer(quiet))


def _put(text: str) -> tuple[Path, str]:
    source, _, target = text.partition(":")
    return Path(source), target or Path(source).resolve().name


def _sayer(quiet: bool) -> Any:
    def say(text: str) -> None:
        if not quiet or text.startswith(("warning:", "console:")):
            common.note(text)

    return say


def _series(kernel: Kernel) -> str:
    return ".".join(kernel.version.split(".")[:2])


def _row(kernel: Kernel, here: bool) -> dict[str, Any]:
    assert kernel.package is not None
    return {
        "version": kernel.version,
        "release": kernel.release,
        "arch": kernel.arch,
        "flavour": kernel.flavour,
        "suite": kernel.package.suite,
        "cached": here,
    }


def _print(rows: list[dict[str, Any]], output: common.Format) -> None:
    if output is common.Format.json:
        common.print_json({"schema": 1, "kernels": rows})
        return
    columns = ("version", "release", "arch", "flavour", "suite", "cached")
    if output is common.Format.csv:
        common.print_csv(columns, rows)
        return
    from vmatrace.cli.doctor_view import plain_table

    table = plain_table(*columns)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns[:-1]), "yes" if row["cached"] else "")
    common.stdout_console().print(table)
