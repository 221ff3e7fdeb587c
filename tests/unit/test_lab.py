"""The lab without a guest: package sources, kernels' names, archives, the cache, a QEMU that pretends."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmatrace.errors import CannotTrace, UsageError
from vmatrace.lab import apt, cache, guest, job, kernels, ramroot, root, runner, tools

KERNEL_META = {"version": "6.16.12", "arch": "x86_64", "flavour": "cloud"}


def quiet(text: str) -> None:
    """Say nothing."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache.cache_dir()


def kernel(release: str, version: str, arch: str = "x86_64", package_version: str = "1") -> kernels.Kernel:
    package = apt.Package(f"linux-image-{release}", package_version, "trixie")
    folder = cache.cache_dir() / "kernels" / arch / release
    return kernels.Kernel(release, version, arch, "cloud", package, folder, folder / "vmlinuz")


# ---- package sources ----


def test_mirror_is_read_from_both_source_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://no/debian bookworm main\ndeb [arch=amd64] https://cloud.example sdk main\n"
    )
    (tmp_path / "sources.list.d" / "a.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\n\n"
        "Types: deb deb-src\n# a remark\nURIs: http://mirror.example/debian\n"
        "Suites: bookworm\n bookworm-updates\n\n"
        "Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\n"
    )
    monkeypatch.setattr(apt, "_SOURCES", tmp_path)
    assert apt.mirror_of("trixie") == "http://mirror.example/debian"
    assert apt.mirror_of("trixie-security") == "http://mirror.example/debian-security"


def test_security_archive_is_guessed_beside_the_main_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources.list").write_text("deb http://m.example/debian/ bookworm main\n")
    monkeypatch.setattr(apt, "_SOURCES", tmp_path)
    assert apt.mirror_of("bookworm-security") == "http://m.example/debian-security"


def test_machine_without_debian_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_SOURCES", tmp_path)
    with pytest.raises(CannotTrace, match="none of them is a Debian archive"):
        apt.mirror_of("trixie")


# ---- which kernel ----


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("6.1", "6.1.0-56-cloud-amd64"),
        ("6.1.192", "6.1.0-56-cloud-amd64"),
        ("6.12", "6.12.117+deb13-cloud-amd64"),
        ("6.12.107", "6.12.107+deb13-cloud-amd64"),
        ("6.12.107+deb13-cloud-amd64", "6.12.107+deb13-cloud-amd64"),
    ],
)
def test_a_version_or_its_beginning_names_the_latest(
    wanted: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [
        kernel("6.1.0-56-cloud-amd64", "6.1.192"),
        kernel("6.12.107+deb13-cloud-amd64", "6.12.107"),
        kernel("6.12.117+deb13-cloud-amd64", "6.12.117"),
        kernel("6.16.12+deb13-cloud-amd64", "6.16.12"),
    ]
    monkeypatch.setattr(kernels, "available", lambda *_, **__: there)
    assert kernels.resolve(wanted, "x86_64", "cloud", quiet).release == expected


def test_unknown_kernel_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda *_, **__: [kernel("6.16.12+deb13-cloud-amd64", "6.16.12")])
    with pytest.raises(CannotTrace, match=r"6\.15, x86_64 cloud: Debian's archive has none") as raised:
        kernels.resolve("6.15", "x86_64", "cloud", quiet)
    assert "6.16" in raised.value.hint


def test_cached_kernel_needs_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cached_kernel()

    def offline(*_: object, **__: object) -> list[kernels.Kernel]:
        raise CannotTrace("no network")

    monkeypatch.setattr(kernels, "available", offline)
    assert kernels.resolve("6.16", "x86_64", "cloud", quiet) == wanted
    assert kernels.fetch_kernel(wanted, quiet) == wanted


def cached_kernel() -> kernels.Kernel:
    found = kernel("6.16.12+deb13-cloud-amd64", "6.16.12")
    assert found.folder is not None
    assert found.package is not None
    with cache.made_whole(found.folder) as work:
        (work / "vmlinuz").write_bytes(b"kernel")
        package = {name: getattr(found.package, name) for name in ("name", "version", "suite")}
        cache.write_meta(work, {**KERNEL_META, "release": found.release, "package": package}, ["vmlinuz"])
    return found


def test_damaged_kernel_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cached_kernel()
    wanted.image.write_bytes(b"kernal")
    again: list[str] = []
    monkeypatch.setattr(kernels, "_fetch_into", lambda kernel, folder, say: again.append(kernel.release))
    kernels.fetch_kernel(wanted, quiet)
    assert again == [wanted.release]


@pytest.mark.parametrize("arch", ["riscv64", ""])
def test_other_architectures_are_refused(arch: str) -> None:
    with pytest.raises(UsageError):
        kernels.normal_arch(arch)


# ---- the cache ----


def test_what_fails_leaves_nothing_in_the_cache(own_cache: Path) -> None:
    def half_done() -> None:
        with cache.made_whole(own_cache / "kernels" / "k") as work:
            (work / "half").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_done()
    assert list((own_cache / "kernels").iterdir()) == []


def test_what_a_killed_lab_left_is_removed(own_cache: Path) -> None:
    (own_cache / "kernels" / "unfinished-k-1").mkdir(parents=True)
    with cache.made_whole(own_cache / "kernels" / "k") as work:
        (work / "whole").write_bytes(b"x")
    assert [entry.name for entry in (own_cache / "kernels").iterdir()] == ["k"]


def test_no_room_is_said_before_anything_is_done(own_cache: Path) -> None:
    with pytest.raises(CannotTrace, match="MB free, a test needs"):
        cache.need_room(own_cache, 1 << 40, "a test")


def test_second_lab_waits_for_the_first(own_cache: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time\nf = open(sys.argv[1], 'a')\n"
         "fcntl.flock(f, fcntl.LOCK_EX)\nprint(flush=True)\ntime.sleep(0.5)", own_cache / "x.lock"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    said: list[str] = []
    with cache.locked("x", said.append):
        assert holder.wait() == 0
    assert said == ["waiting for another lab that holds x.lock"]


# ---- archives ----


def test_job_holds_vmatrace_the_command_and_the_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    wanted = job.Job(("echo", "a b", "$HOME"), ((tmp_path / "file", "file"), (tmp_path / "file", "/etc/x")))
    job.pack(wanted, tmp_path / "job.tar")
    with tarfile.open(tmp_path / "job.tar") as archive:
        names = archive.getnames()
        script = archive.extractfile("lab/run")
        assert script is not None
        assert "echo 'a b' '$HOME'" in script.read().decode()
    assert {"job/file", "etc/x", "usr/local/bin/vmatrace", f"{root.SITE}/vmatrace/__init__.py"} <= set(names)
    assert f"{root.SITE}/vmatrace/bpf/vma_compat.h" in names
    assert not [name for name in names if "__pycache__" in name]


def test_guest_scripts_bring_back_what_matches(tmp_path: Path) -> None:
    """The scripts run here as they would in the guest, with / replaced by a folder."""
    wanted = job.Job(("sh", "-c", "echo out; echo err >&2; touch a.vmat b.vmat; exit 7"), get=("*.vmat", "gone", "sub"))
    for name in ("lab/out", "job/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "job/sub/inner").write_text("inner")
    for text, words in (
        (job._run_script(wanted.command), ()),
        (job._collect_script(wanted.get), (tmp_path / "t",)),
    ):
        rooted = re.sub(r"(?<![\w.*/])/(?=lab/|job\b)|-C / ", lambda m: m[0].replace("/", f"{tmp_path}/"), text)
        subprocess.run(["sh", "-c", rooted, "sh", *words], check=True, env={"PATH": os.environ["PATH"]})
    (tmp_path / "back").mkdir()
    returned = job.unpack(tmp_path / "t", job.Job((), into=tmp_path / "back"))
    assert returned is not None
    assert (returned.status, returned.stdout, returned.stderr) == (7, b"out\n", b"err\n")
    assert sorted(file.name for file in returned.files) == ["a.vmat", "b.vmat", "inner"]
    assert [trouble.message for trouble in returned.trouble] == ["--get gone: no such file in the guest"]


def results(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_results_stay_inside_their_folder_and_overwrite_nothing(tmp_path: Path) -> None:
    results(
        tmp_path / "t",
        {"lab/out/rc": b"0\n", "../evil": b"x", "/etc/evil": b"x", "here": b"new", "sub/file": b"x"},
    )
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "here").write_text("old")
    returned = job.unpack(tmp_path / "t", job.Job((), into=tmp_path / "into"))
    assert returned is not None
    assert [str(file.relative_to(tmp_path)) for file in returned.files] == ["into/sub/file"]
    assert "exists already" in returned.trouble[0].message
    assert not (tmp_path / "evil").exists()
    assert (tmp_path / "into" / "here").read_text() == "old"


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"rc" * 600])
def test_results_without_a_status_are_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(data)
    assert job.unpack(tmp_path / "t", job.Job(())) is None


def test_root_in_memory_is_a_newc_archive(tmp_path: Path) -> None:
    (tmp_path / "tree" / "bin").mkdir(parents=True)
    (tmp_path / "tree" / "bin" / "sh").symlink_to("dash")
    (tmp_path / "tree" / "file").write_bytes(b"12345")
    with (tmp_path / "cpio").open("wb") as target:
        ramroot.write_tree(target, tmp_path / "tree")
    entries = dict(newc_entries((tmp_path / "cpio").read_bytes()))
    assert entries["bin/sh"] == b"dash"
    assert entries["file"] == b"12345"
    assert list(entries)[-1] == "TRAILER!!!"
    assert "dev/console" in entries


def newc_entries(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        begin = at + (110 + length + 3) // 4 * 4
        yield data[at + 110 : at + 109 + length].decode(), data[begin : begin + size]
        at = begin + (size + 3) // 4 * 4


def test_image_has_the_partition_that_the_kernel_is_told(tmp_path: Path) -> None:
    if tools.find("mke2fs") is None:
        pytest.skip("mke2fs is not installed here")
    (tmp_path / "tree").mkdir()
    root._make_image(tmp_path / "tree", tmp_path / "root.img")
    with (tmp_path / "root.img").open("rb") as file:
        sector = file.read(512)
        file.seek(root.START + 1024 + 56)
        assert file.read(2) == b"\x53\xef", "no ext4 file system at the partition's start"
    assert f"{struct.unpack_from('<I', sector, 440)[0]:08x}-01" == root.PARTUUID
    kind, start = sector[450], struct.unpack_from("<I", sector, 454)[0]
    assert (kind, start * 512, sector[510:]) == (0x83, root.START, b"\x55\xaa")


# ---- a run, with a QEMU that pretends ----

PRETENDER = """#!{python}
import sys, tarfile, io, time
words = sys.argv
console = next(w[5:] for w in words if w.startswith("file:"))
out = next(w for w in words if "id=labout" in w).split("file=")[1].split(",")[0]
tried = console + ".tried"
{body}
"""
ANSWER = """
with open(console, "a") as file:
    print("vmatrace-lab: up", file=file)
with open(out, "r+b") as file:
    archive = tarfile.open(fileobj=file, mode="w")
    for name, data in (("rc", b"3"), ("stdout", b"said"), ("stderr", b"")):
        member = tarfile.TarInfo("lab/out/" + name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    archive.close()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> guest.Machine:
    image = tmp_path / "root.img"
    image.write_bytes(b"")
    monkeypatch.setattr(runner, "fetch_root", lambda arch, say: root.Root(arch, image))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "Image").write_bytes(b"")
    return guest.Machine(kernels.own_kernel(tmp_path / "Image", "x86_64", None), "tcg")


def pretend(tmp_path: Path, body: str) -> None:
    program = tmp_path / "bin" / "qemu-system-x86_64"
    program.write_text(PRETENDER.format(python=sys.executable, body=body))
    program.chmod(0o755)


def test_run_gives_back_the_commands_status_and_output(tmp_path: Path, machine: guest.Machine) -> None:
    pretend(tmp_path, ANSWER)
    result = runner.run(job.Job(("x",)), machine, quiet, timeout=5)
    assert (result.status, result.stdout, result.accel) == (3, b"said", "tcg")


def test_boot_that_dies_early_is_tried_again(tmp_path: Path, machine: guest.Machine) -> None:
    mark = tmp_path / "mark"
    first = f"import os\nif not os.path.exists({str(mark)!r}):\n"
    first += f"    open({str(mark)!r}, 'w').close()\n    sys.exit(0)\n"
    pretend(tmp_path, first + ANSWER)
    said: list[str] = []
    assert runner.run(job.Job(("x",)), machine, said.append, timeout=5).status == 3
    assert "warning: Image did not come up under tcg: it died early" in said


def test_kernel_that_never_boots_shows_its_console(tmp_path: Path, machine: guest.Machine) -> None:
    pretend(tmp_path, "open(console, 'w').write('\\x1b[2JKernel panic: no root\\r\\n')")
    said: list[str] = []
    with pytest.raises(CannotTrace, match="does not boot: it ended before user space") as raised:
        runner.run(job.Job(("x",)), machine, said.append, timeout=5)
    assert raised.value.exit_code == 3
    assert said[-1] == "console: Kernel panic: no root"


def test_image_that_qemu_refuses_is_tried_once(tmp_path: Path, machine: guest.Machine) -> None:
    mark = tmp_path / "mark"
    pretend(tmp_path, f"open({str(mark)!r}, 'a').write('x')\nsys.exit('qemu: invalid kernel header')")
    with pytest.raises(CannotTrace, match="QEMU ended with status 1: qemu: invalid kernel header"):
        runner.run(job.Job(("x",)), machine, quiet, timeout=5)
    assert mark.read_text() == "x"


def test_command_that_hangs_is_killed(tmp_path: Path, machine: guest.Machine) -> None:
    pretend(tmp_path, "print('vmatrace-lab: up', file=open(console, 'w'), flush=True)\ntime.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(CannotTrace, match=r"took longer than 0\.3 s") as raised:
        runner.run(job.Job(("x",)), machine, quiet, timeout=0.3)
    assert time.monotonic() - begin < 10
    assert "--timeout" in raised.value.hint


def test_guest_without_a_result_is_an_error(tmp_path: Path, machine: guest.Machine) -> None:
    pretend(tmp_path, "print('vmatrace-lab: up', file=open(console, 'w'), flush=True)")
    with pytest.raises(CannotTrace, match="ended without a result"):
        runner.run(job.Job(("x",)), machine, quiet, timeout=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_guest_outlives_the_lab(number: int, tmp_path: Path, machine: guest.Machine) -> None:
    """The lab is a process of its own here; the pretender notes its PID and sleeps."""
    pretend(tmp_path, f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    child = os.fork()
    if child == 0:
        try:
            runner.run(job.Job(("x",)), machine, quiet, timeout=60)
        finally:
            os._exit(9)
    deadline = time.monotonic() + 20
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, number)
    os.waitpid(child, 0)
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the guest lives on"
        time.sleep(0.01)


def test_files_of_a_killed_lab_are_removed(own_cache: Path) -> None:
    left = own_cache / "runs" / "1-left"
    left.mkdir(parents=True)
    with cache.run_folder() as folder:
        assert not left.exists()
        with cache.run_folder():
            assert folder.exists(), "another lab's folder is in use"
    assert list((own_cache / "runs").iterdir()) == []


def test_missing_files_are_usage_errors(tmp_path: Path, machine: guest.Machine) -> None:
    with pytest.raises(UsageError, match="no such file"):
        runner.run(job.Job(("x",), put=((tmp_path / "gone", "gone"),)), machine, quiet, timeout=5)


def test_qemu_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda program: None)
    with pytest.raises(CannotTrace, match="qemu-system-arm") as raised:
        tools.need(("qemu-system-aarch64",), quiet)
    assert "apt-get install" in raised.value.hint


def test_console_text_is_safe_to_print(tmp_path: Path) -> None:
    (tmp_path / "console").write_bytes(b"\x1bc\x1b[1;1H\x1b[8;25;80tone\r\n\r\n\x07two\r\n")
    assert guest.last_words(tmp_path / "console") == ["one", "\\007two"]
