"""Finds the distribution's bcc, from an isolated environment too, and wraps the few calls that we need of it.

bcc's Python binding is pure ctypes, so it works under any interpreter that can read its folder; the PyPI project
of the same name is another thing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from vmatrace.errors import CannotTrace

_PLACES = (Path("/usr/lib/python3/dist-packages/bcc"),)


def load_bcc() -> ModuleType:
    """The module ``bcc``. Raises `CannotTrace` where the distribution's package is not installed."""
    module = sys.modules.get("bcc")
    if module is not None and hasattr(module, "BPF"):
        return module
    found = [place / "__init__.py" for place in _PLACES]
    found += [Path(place) / "bcc" / "__init__.py" for place in sys.path]
    for file in found:
        if (file.parent / "libbcc.py").is_file():
            return _load_from(file)
    raise CannotTrace("bcc: not found", "install it: apt-get install python3-bpfcc (the PyPI project `bcc` is another)")


def _load_from(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bcc", file, submodule_search_locations=[str(file.parent)])
    if spec is None or spec.loader is None:
        raise CannotTrace(f"bcc, {file}: cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, AttributeError) as error:
        del sys.modules["bcc"]
        raise CannotTrace(f"bcc, {file}: {error}", "reinstall it: apt-get install --reinstall python3-bpfcc") from error
    return module


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collects what C code prints on file descriptor 2 (bcc prints compiler and verifier text there)."""
    text: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.memfd_create("bcc-messages"), "r+b", buffering=0) as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            text += sink.read().decode("utf-8", "backslashreplace").splitlines()


class Program:
    """One compiled BPF object: its maps by name, its programs loaded and attached on demand, all let go by close()."""

    def __init__(self, source: str, include: tuple[Path, ...]) -> None:
        self._bcc = load_bcc()
        self._attached: list[str] = []
        # bcc optimises what the front end gives it: one pass over the program is enough.
        flags = [*(f"-I{folder}" for folder in include), "-Xclang", "-disable-llvm-passes"]
        with captured_stderr() as said:
            try:
                self.bpf: Any = self._bcc.BPF(text=source.encode(), cflags=flags)
            except Exception as error:  # bcc raises bare Exception
                raise CannotTrace(f"BPF program: {error}", _last_words(said)) from error

    def load(self, function: str, *, tracing: bool = False) -> Any:
        """Load one function; raise `CannotTrace` with the kernel's last words when it is refused."""
        kind = self._bcc.BPF.TRACING if tracing else self._bcc.BPF.RAW_TRACEPOINT
        with captured_stderr() as said:
            try:
                return self.bpf.load_func(function.encode(), kind)
            except Exception as error:
                raise CannotTrace(f"BPF program {function}: {error}", _last_words(said)) from error

    def code(self, function: str) -> bytes:
        """The compiled instructions of a function, its maps filled in."""
        return bytes(self.bpf.dump_func(function.encode()))

    def attach(self, tracepoint: str, function: str) -> None:
        """Attach a loaded function to a raw tracepoint."""
        with captured_stderr() as said:
            try:
                self.bpf.attach_raw_tracepoint(tracepoint.encode(), function.encode())
            except Exception as error:
                raise CannotTrace(f"raw tracepoint {tracepoint}: {error}", _last_words(said)) from error
        self._attached.append(tracepoint)

    def read_iterator(self, fd: int) -> bytes:
        """Everything one run of the loaded iterator program ``fd`` writes."""
        lib = self._bcc.lib
        link = lib.bcc_iter_attach(fd, None, 0)
        if link < 0:
            raise CannotTrace("BPF iterator: cannot be attached", os.strerror(ctypes.get_errno()))
        try:
            run = lib.bcc_iter_create(link)
            if run < 0:
                raise CannotTrace("BPF iterator: cannot be started", os.strerror(ctypes.get_errno()))
            with open(run, "rb", buffering=0) as stream:
                return stream.readall()
        finally:
            os.close(link)

    def table(self, name: str) -> Any:
        """The map ``name`` (bcc's own table object)."""
        return self.bpf[name.encode()]

    def detach(self) -> None:
        """Detach everything."""
        for tracepoint in self._attached:
            self.bpf.detach_raw_tracepoint(tracepoint.encode())
        self._attached.clear()

    def close(self) -> None:
        """Detach and unload everything."""
        self.detach()
        self.bpf.cleanup()


def _last_words(said: list[str]) -> str:
    lines = [line.strip() for line in said if line.strip()]
    return "the kernel or compiler said: " + " | ".join(lines[-3:])[-300:] if lines else "run `vmatrace doctor`"
