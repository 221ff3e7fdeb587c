#!/usr/bin/env python3
"""Builds the C workloads into a directory outside the tree, each only when it is out of date.

As a program: ``build.py [--into DIR] [NAME ...]`` prints the directory. As a module: ``build(names)``
gives ``{name: Path}``; a program that this machine cannot build (compat32 without -m32) is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-fno-stack-protector"]
SPECIAL = {
    "compat32": ["-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie"],
    "vmafuzz": ["-pthread"],
    "threads": ["-pthread"],
    "demo": ["-pthread"],
    "stacks": ["-fno-omit-frame-pointer", "-fno-optimize-sibling-calls"],
}
OPTIONAL = frozenset({"compat32"})

# The programs that know their own counts (--expect).
COUNTED = (
    "splits",
    "merges",
    "fork_counts",
    "mremap_counts",
    "lock_advise",
    "brk_growth",
    "stack_growth",
    "vfork_exec",
    "threads",
    "clone_vm",
    "exec_chain",
    "mprotect_gap",
    "multi_process",
)


def default_directory() -> Path:
    """The build directory of this checkout: by user and path, so that two checkouts never share one."""
    digest = hashlib.sha256(str(HERE).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"vmatrace-workloads-{os.getuid()}-{digest}"


def names() -> list[str]:
    """Every workload there is, sorted."""
    return sorted(source.stem for source in HERE.glob("*.c"))


def build(wanted: list[str] | None = None, into: Path | None = None) -> dict[str, Path]:
    """Compiles ``wanted`` (all by default); raises ``subprocess.CalledProcessError`` if gcc refuses."""
    directory = into or default_directory()
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    built: dict[str, Path] = {}
    for name in wanted or names():
        target = _compile(name, directory)
        if target is not None:
            built[name] = target
    return built


def _compile(name: str, directory: Path) -> Path | None:
    source, target = HERE / f"{name}.c", directory / name
    newest = max(
        source.stat().st_mtime, (HERE / "workload.h").stat().st_mtime, Path(__file__).stat().st_mtime
    )
    if target.exists() and target.stat().st_mtime >= newest:
        return target
    # Built aside and renamed: a test that runs at the same time never sees half a program.
    scratch = directory / f".{name}.{os.getpid()}"
    command = ["gcc", *FLAGS, *SPECIAL.get(name, []), "-o", str(scratch), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if name in OPTIONAL:
            return None
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    scratch.replace(target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """The command line: builds, prints where, and says what could not be built."""
    parser = argparse.ArgumentParser(description="Build the C workloads.")
    parser.add_argument("--into", type=Path, default=None, help="directory for the programs")
    parser.add_argument("names", nargs="*", help="workloads to build; all by default")
    options = parser.parse_args(arguments)
    try:
        built = build(options.names or None, options.into)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
        return 1
    for name in sorted(set(options.names or names()) - set(built)):
        sys.stderr.write(f"warning: {name}: not built, gcc cannot make such programs here\n")
    sys.stdout.write(f"{options.into or default_directory()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
