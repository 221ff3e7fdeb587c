"""The operations layer on the running kernel: load, attach, choose what is traced, read records and snapshots.

Holds no policy of a recording (when it ends, where it goes): that is session.py.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vmatrace import btf as kernel_btf
from vmatrace.capture.bcc import Program
from vmatrace.capture.decisions import SOURCES as DECISION_SOURCES
from vmatrace.capture.headers import write_headers
from vmatrace.capture.parameters import decisions_header
from vmatrace.capture.ring import Cells, RingReader
from vmatrace.errors import CannotTrace
from vmatrace.resources import bpf_dir
from vmatrace.schema import MISC, OP_CLASSES
from vmatrace.syscalls import architecture, op_classes

TRACEPOINTS = (
    "mmap_lock_acquire_returned",
    "mmap_lock_released",
    "vm_unmapped_area",
    "sys_exit",
    "ma_write",
    "kmem_cache_alloc",
    "kmem_cache_free",
    "sched_process_fork",
    "sched_process_exec",
    "sched_process_exit",
    "exit_mmap",
)
# One program for bcc, which rewrites map calls in the main file only: the parts are put together in this order.
SOURCES = ("space.c", "records.c", "files.c", "walk.c", "stacks.c", "calls.c", "evidence.c", "lives.c", "snapshot.c")
SNAPSHOT_WORDS = 24
USER_STACKS = 1 << 15
"""Different user stacks of one recording; two that fall into one place of the kernel's map count as one lost."""
FIRST_OWN_SPACE = 1 << 24
"""Address spaces registered from here get numbers from this one on; those registered in BPF count from 1."""


class Operations:
    """A loaded operations layer. ``attach`` arms it; ``close`` detaches everything.

    ``decisions``: the programs of the decisions layer are compiled too (`vmatrace.capture.decisions` attaches them).
    ``stacks``: calls carry their user stack.
    """

    def __init__(
        self, *, ring_bytes: int = 16 << 20, max_spaces: int = 1024, decisions: bool = False, stacks: bool = False
    ) -> None:
        btf = kernel_btf.load()
        parts = [f"operations/{part}" for part in SOURCES]
        page = os.sysconf("SC_PAGE_SIZE")
        with tempfile.TemporaryDirectory(prefix="vmatrace-") as folder:
            room = {"ring_pages": ring_bytes // page, "max_spaces": max_spaces, "user_stacks": USER_STACKS * stacks}
            root = write_headers(Path(folder), btf, **room)
            if decisions:
                (root / "vmatrace_decisions.h").write_text(decisions_header(btf))
                parts += [f"decisions/{part}" for part in DECISION_SOURCES]
            os.environ["BCC_KERNEL_SOURCE"] = str(root)
            try:
                source = "\n".join((bpf_dir() / part).read_text() for part in parts)
                self.program = Program(source, (root, bpf_dir()))
            finally:
                del os.environ["BCC_KERNEL_SOURCE"]
        self._spaces = self.program.table("spaces")
        _check_leaf(self._spaces)
        self._tgids = self.program.table("traced_tgids")
        self._next_space = FIRST_OWN_SPACE
        self._iterator: int | None = None
        self._load()
        self.ring = RingReader(self.program.table("ring").map_fd, ring_bytes)

    def _load(self) -> None:
        program = self.program
        walker = program.table("walker")
        for slot, name in enumerate(("walk", "describe_files")):
            walker[slot] = ctypes.c_int(program.load(name).fd)
        for tracepoint in TRACEPOINTS:
            program.load(f"on_{tracepoint}")
        classes = program.table("op_classes")
        packed: dict[int, int] = {}
        for (abi, nr), name in op_classes(architecture(platform.machine())).items():
            packed[nr] = packed.get(nr, 0) | OP_CLASSES[name] << (8 if abi else 0)
        for nr, value in packed.items():
            classes[nr] = ctypes.c_uint16(value)

    def attach(self) -> None:
        """Arm all hooks."""
        for tracepoint in TRACEPOINTS:
            self.program.attach(tracepoint, f"on_{tracepoint}")

    def trace_process(self, pid: int) -> None:
        """From its next exec on, trace this thread group; its present address space needs `register`."""
        self._tgids[ctypes.c_uint32(pid)] = ctypes.c_uint32(1)

    def expect(self, secret: int) -> None:
        """From its next exec on, trace the process that calls ``prctl(ANNOUNCE, secret)``."""
        self.program.table("settings")[MISC["SETTING_SECRET"]] = ctypes.c_uint64(secret)

    def trace_all(self) -> None:
        """Trace every exec and each child of a traced address space."""
        self.program.table("settings")[MISC["SETTING_ALL"]] = ctypes.c_uint64(1)

    def register(self, mm: int) -> int:
        """Start tracing the address space at kernel address ``mm``; return its number."""
        blank = self._spaces.Leaf()
        blank.id = self._next_space
        self._next_space += 1
        self._spaces[ctypes.c_uint64(mm)] = blank
        return int(blank.id)

    def registered(self) -> list[int]:
        """Kernel addresses of the address spaces traced now."""
        return [int(key.value) for key in self._spaces]

    def space_seqs(self) -> list[tuple[int, int]]:
        """Number and finished write sections so far of the address spaces that are alive."""
        return [(int(leaf.id), int(leaf.seq) - (leaf.open_tid != 0)) for leaf in self._spaces.values()]

    def snapshot(self) -> Cells:
        """All VMAs of all traced thread groups, a row of SNAPSHOT_WORDS words each."""
        if self._iterator is None:  # loaded when first needed: the verifier takes its time over it
            self._iterator = int(self.program.load("bpf_iter__task_vma", tracing=True).fd)
        data = self.program.read_iterator(self._iterator)
        whole = len(data) // (8 * SNAPSHOT_WORDS) * SNAPSHOT_WORDS * 8
        return np.frombuffer(data[:whole], dtype=np.uint64).reshape(-1, SNAPSHOT_WORDS)

    def user_stack(self, number: int) -> list[int]:
        """The return addresses of a user stack, innermost first."""
        found = self.program.table("user_stacks")[ctypes.c_uint32(number)]
        return list(itertools.takewhile(bool, found.address))

    def counts(self) -> dict[str, list[int]]:
        """Counters by name, a number per CPU: records made, records lost, address spaces that found no room."""
        table = self.program.table("counts")
        names = {"records": "COUNT_RECORDS", "lost": "COUNT_LOST", "no_space": "COUNT_NO_SPACE"}
        return {name: [int(value) for value in table[MISC[key]]] for name, key in names.items()}

    def forget(self) -> None:
        """Trace no address space any more."""
        self._spaces.clear()

    def detach(self) -> None:
        """Disarm all hooks; what the ring holds can still be read."""
        self.program.detach()

    def close(self) -> None:
        """Detach and unload."""
        self.program.close()
        self.ring.close()


def _check_leaf(table: Any) -> None:
    """bcc guesses a map value's layout; a wrong guess would let the kernel write past our buffer."""
    info = Path(f"/proc/self/fdinfo/{table.map_fd}").read_text()
    size = next(int(line.split()[1]) for line in info.splitlines() if line.startswith("value_size"))
    if ctypes.sizeof(table.Leaf) != size:
        raise CannotTrace(f"bcc: takes a value of {size} bytes for {ctypes.sizeof(table.Leaf)}", "report this")


def program_stats(operations: Operations) -> dict[str, Any]:
    """Run time and runs of each BPF program as the kernel counted them (kernel.bpf_stats_enabled), by name."""
    found: dict[str, Any] = {}
    for name, function in operations.program.bpf.funcs.items():
        info = Path(f"/proc/self/fdinfo/{function.fd}").read_text()
        fields = dict(line.split(":\t", 1) for line in info.splitlines() if ":\t" in line)
        found[name.decode()] = {"ns": int(fields.get("run_time_ns", 0)), "runs": int(fields.get("run_cnt", 0))}
    return found
