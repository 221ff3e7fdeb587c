"""The single source of record layouts: what leaves BPF, what a trace file holds, and what each field is for.

Two forms of the same data are described here. In the ring buffer a record is a run of 64-byte *cells*: a head
cell and cells that belong to it, each told apart by its tag. In a trace file the records of one kind are one
table (`TABLES`), whose fields carry a unit, a sentence and a *role*:

* ``predicted``: replay predicts it and compares; altering one must make a verdict FAILED;
* ``input``: replay takes it from the trace, within checks;
* ``informational``: nothing is decided by it.

Nothing here reads or writes files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SCHEMA_VERSION: Final = 1

PREDICTED: Final = "predicted"
INPUT: Final = "input"
INFORMATIONAL: Final = "informational"

# ---- the ring buffer ---------------------------------------------------------------------------------------

CELL_BYTES: Final = 64
"""Every record is a whole number of cells; the first 8 bytes of its first cell are the ring buffer's own header.

That header's low 32 bits are the length, a multiple of 8; every other cell begins with an odd tag. So a flat
array of cells tells its record heads by one bit (BPF_RINGBUF_BUSY_BIT and _DISCARD_BIT are bits 31 and 30).
"""

KINDS: Final = {
    "SECTION": 1,  # one write section of an address space
    "CALL": 2,  # a listed system call returned
    "FORK": 3,  # a task was born: a thread, or a process with an address space of its own
    "EXEC": 4,  # a new program image, read whole
    "LAST": 5,  # exit_mmap begins: the address space, read whole for the last time
    "SPACE_END": 6,  # exit_mmap is over
    "TASK_EXIT": 7,
    "FILE": 8,  # a file, when one of its mappings is first seen
    "ANON_VMA": 9,  # a VMA gains an anon_vma
}

CELLS: Final = {  # the low byte of a tag; all odd
    "CELL_BEFORE": 1,  # a VMA, before
    "CELL_AFTER": 3,  # a VMA, after
    "CELL_EXTRA": 5,  # rare attributes of the VMA cell just before
    "CELL_COVER": 7,  # closes a walked range
    "CELL_EVIDENCE": 9,  # one or two of: store, birth, death
    "CELL_ARGS": 11,  # six arguments
}

EVIDENCE: Final = {
    "EVIDENCE_STORE": 1,  # maple_tree:ma_write from mas_store_prealloc
    "EVIDENCE_ALLOC": 2,  # born in vm_area_alloc
    "EVIDENCE_DUP": 3,  # born in vm_area_dup
    "EVIDENCE_MERGED": 4,  # freed in vma_complete
    "EVIDENCE_UNMAPPED": 5,  # freed in vms_complete_munmap_vmas or remove_vma
    "EVIDENCE_FREED": 6,  # freed in vm_area_free, cause unknown
}

OP_CLASSES: Final = {
    "OP_NONE": 0,
    "OP_RANGE": 1,  # address and length are the first two arguments
    "OP_MMAP": 2,
    "OP_BRK": 3,
    "OP_MREMAP": 4,
    "OP_WHOLE": 5,  # may change any VMA
    "OP_FORK": 6,
    "OP_OTHER": 7,  # listed; the range is known from its stores only
    "OP_PRCTL": 8,
    "OP_UFFD": 9,  # ioctl of a userfaultfd
    "OP_EXEC": 10,
    "OP_FAULT": 11,  # no system call in flight
    "OP_LIMITS": 12,  # changes a limit that decides
    "OP_MBIND": 13,
    "OP_VECTOR": 14,  # process_madvise: ranges in user memory, maybe of another process
    "OP_OLD_MMAP": 15,  # i386: the arguments are a structure in user memory
}

ROW_BITS: Final = {
    "ROW_ANONYMOUS": 1,  # vm_ops is NULL
    "ROW_CLOSE": 2,  # vm_ops->close is set
    "ROW_FORKED": 4,  # anon_vma_chain holds more than one entry
    "ROW_EXTRA": 8,  # a CELL_EXTRA follows
}

FILE_BITS: Final = {
    "FILE_MMAP": 1,  # f_op->mmap is set
    "FILE_MMAP_PREPARE": 2,  # f_op->mmap_prepare is set
    "FILE_READ": 4,  # opened for reading (FMODE_READ)
    "FILE_WRITE": 8,  # opened for writing (FMODE_WRITE)
    "FILE_NOEXEC": 16,  # on a mount or file system without execution
    "FILE_OWN_AREA": 32,  # f_op->get_unmapped_area is set
    "FILE_SEALED": 64,  # a memfd sealed against writing, or against future writing
}

COVER_FLAGS: Final = {
    "COVER_UNREADABLE": 1,
    "COVER_NO_TREE": 2,
    "COVER_DEAD_NODE": 4,
    "COVER_CUT": 8,  # the walk ran out of tail calls
}

MISC: Final = {
    "SECTION_PARTIAL": 1,  # more cells of the same write section follow in a record numbered one higher
    "COUNT_RECORDS": 0,
    "COUNT_LOST": 1,
    "COUNT_NO_SPACE": 2,
    "COUNT_MAX": 4,
    "SETTING_ALL": 0,
    "SETTING_SECRET": 1,
    "ANNOUNCE": 0x766D61,  # "vma", as the first argument of prctl()
    "FILE_PATH": 1024,
    "FILE_BYTES": 1144,
}

# ---- the trace file ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """One column. ``type``: u8 u16 u32 u64 i64, ``text``, ``list<TABLE>``; ``pointer``: an opaque id in the file."""

    name: str
    type: str
    role: str
    doc: str
    pointer: bool = False


def _f(name: str, type: str, role: str, doc: str, pointer: bool = False) -> Field:
    return Field(name, type, role, doc, pointer)


_WHEN = (
    _f("index", "u64", INPUT, "position in the order in which records left the kernel; one order over all tables"),
    _f("time", "u64", INFORMATIONAL, "CLOCK_MONOTONIC, ns"),
    _f("cpu", "u16", INFORMATIONAL, "CPU the record was made on"),
    _f("cpu_seq", "u32", INPUT, "counts the records of that CPU, lost ones too: a gap proves a loss"),
)
_WHO = (
    _f("space", "u32", INPUT, "address space: a number per mm_struct and generation, never used again"),
    _f("seq", "u32", INPUT, "write sections of that address space so far; a gap proves a loss"),
    _f("pid", "u32", INPUT, "thread group of the task, initial PID namespace"),
    _f("tid", "u32", INPUT, "the task"),
)

VMA_FIELDS: Final = (
    _f("start", "u64", PREDICTED, "vm_start, bytes"),
    _f("end", "u64", PREDICTED, "vm_end, bytes, exclusive"),
    _f("flags", "u64", PREDICTED, "vm_flags"),
    _f("pgoff", "u64", PREDICTED, "vm_pgoff, pages"),
    _f("bits", "u32", PREDICTED, "ROW_BITS: anonymous, close hook, forked"),
    _f("object", "u64", PREDICTED, "the vm_area_struct", pointer=True),
    _f("anon_vma", "u64", PREDICTED, "anon_vma or 0", pointer=True),
    _f("file", "u64", PREDICTED, "vm_file or 0; described in the table files", pointer=True),
    _f("uffd", "u64", PREDICTED, "userfaultfd context or 0", pointer=True),
    _f("policy", "u64", PREDICTED, "NUMA policy by content (mode, flags, home node, nodes), 0: none"),
    _f("name", "text", PREDICTED, "anon_name, the first 39 bytes, or empty"),
)
COVER_FIELDS: Final = (
    _f("start", "u64", INPUT, "the rows are complete from here"),
    _f("end", "u64", INPUT, "to here, exclusive; 0: no range was walked"),
    _f("flags", "u8", INPUT, "COVER_FLAGS: why the walk is not to be trusted, 0: it is"),
    _f("rows", "u32", INPUT, "how many rows belong to it"),
)
EVIDENCE_FIELDS: Final = (
    _f("what", "u8", PREDICTED, "EVIDENCE: store, birth or death of a VMA object, in the order seen"),
    _f("object", "u64", PREDICTED, "the vm_area_struct", pointer=True),
    _f("start", "u64", PREDICTED, "a store's first byte, else 0"),
    _f("end", "u64", PREDICTED, "a store's end, else 0"),
)
SECTION_FIELDS: Final = (
    *_WHEN,
    *_WHO,
    _f("kind", "u8", INPUT, "KINDS: SECTION, EXEC or LAST"),
    _f("parts", "u16", INPUT, "ring-buffer records that the section came in; cpu_seq is that of the last"),
    _f("op_class", "u8", INPUT, "OP_CLASSES of the system call in flight"),
    _f("abi", "u8", INPUT, "0: native, 1: 32-bit"),
    _f("nr", "u16", INPUT, "number of the system call in flight; 65535 in a fault"),
    _f("acquired", "u64", INFORMATIONAL, "when the write lock was taken, ns"),
    _f("comm", "text", INFORMATIONAL, "EXEC: the task's name"),
    _f("def_flags", "u64", INPUT, "mm->def_flags when the lock was taken"),
    _f("mm_flags", "u64", INPUT, "mm->flags when the lock was taken"),
    _f("brk_before", "u64", INPUT, "mm->brk when the lock was taken"),
    _f("start_brk", "u64", INPUT, "mm->start_brk"),
    _f("brk", "u64", PREDICTED, "mm->brk when the lock was let go"),
    _f("map_count", "u32", PREDICTED, "mm->map_count when the lock was let go"),
    _f("total_vm", "u64", PREDICTED, "pages"),
    _f("data_vm", "u64", PREDICTED, "pages"),
    _f("stack_vm", "u64", PREDICTED, "pages"),
    _f("locked_vm", "u64", PREDICTED, "pages"),
    _f("before", "list<vma>", PREDICTED, "VMAs around the range when the lock was taken, walk by walk"),
    _f("before_cover", "list<cover>", INPUT, "the intervals that these are complete for"),
    _f("after", "list<vma>", PREDICTED, "VMAs around the range when the lock was let go"),
    _f("after_cover", "list<cover>", INPUT, "the intervals that these are complete for"),
    _f("evidence", "list<evidence>", PREDICTED, "stores, births and deaths inside the section, in order"),
)
CALL_FIELDS: Final = (
    *_WHEN,
    *_WHO,
    _f("op_class", "u8", INPUT, "OP_CLASSES"),
    _f("abi", "u8", INPUT, "0: native, 1: 32-bit"),
    _f("nr", "u16", INPUT, "number of the system call"),
    _f("result", "i64", PREDICTED, "return value, negative: errno"),
    _f("file", "u64", INPUT, "a failed mmap of a file: the file, 0 where there is none of that number", pointer=True),
    *(_f(f"arg{n}", "u64", INPUT, f"argument {n + 1}, or what it points to (USER_ARGUMENTS)") for n in range(6)),
)
USER_ARGUMENTS: Final = {
    "OP_LIMITS": "arg4, arg5: the new soft and hard limit; 2**64 - 1 where none is set",
    "OP_UFFD": "arg3, arg4, arg5: start, length and mode of the range given to the ioctl",
    "OP_MBIND": "arg3: the first 64 nodes of the mask, 0 where there is none",
    "OP_VECTOR": "arg1, arg5: base and length of the first range (arg2: how many there are)",
    "OP_OLD_MMAP": "arg0 to arg5: the six words of the structure",
}
"""System calls of these classes point to their arguments: what is read there stands in arguments they do not use."""

TASK_FIELDS: Final = (
    *_WHEN,
    *_WHO,
    _f("kind", "u8", INPUT, "KINDS: FORK, SPACE_END or TASK_EXIT"),
    _f("parent_space", "u32", INPUT, "FORK: the parent's address space (the same number for a thread)"),
    _f("parent_seq", "u32", INPUT, "FORK: the parent's write sections so far"),
    _f("parent_tid", "u32", INPUT, "FORK: the task that forked"),
    _f("exit_code", "u32", INFORMATIONAL, "TASK_EXIT: status as wait() gives it"),
    _f("map_count", "u32", PREDICTED, "FORK: the child's"),
    _f("total_vm", "u64", PREDICTED, "FORK: the child's, pages"),
    _f("data_vm", "u64", PREDICTED, "FORK: the child's, pages"),
    _f("stack_vm", "u64", PREDICTED, "FORK: the child's, pages"),
    _f("locked_vm", "u64", PREDICTED, "FORK: the child's, pages"),
    _f("def_flags", "u64", INPUT, "FORK: the child's"),
    _f("brk", "u64", INPUT, "FORK: the child's"),
)
FAULT_FIELDS: Final = (
    *_WHEN,
    *_WHO,
    _f("in_section", "u8", INFORMATIONAL, "1: inside a write section of the task"),
)
FILE_FIELDS: Final = (
    *_WHEN,
    _f("file", "u64", INPUT, "struct file", pointer=True),
    _f("dev", "u32", INFORMATIONAL, "s_dev: major << 20 | minor"),
    _f("ino", "u64", INFORMATIONAL, "inode number"),
    _f("mode", "u16", INPUT, "i_mode"),
    _f("fs_magic", "u32", INPUT, "s_magic of the file system"),
    _f("hooks", "u8", INPUT, "FILE_BITS: hooks, how it was opened, seals"),
    _f("path", "text", INFORMATIONAL, "path as /proc/PID/maps shows it, unescaped; bytes that are no UTF-8 as \\xNN"),
)
LIMIT_FIELDS: Final = (
    *_WHEN,
    _f("pid", "u32", INPUT, "thread group, 0: the whole machine"),
    _f("name", "text", INPUT, "RLIMIT_AS RLIMIT_DATA RLIMIT_STACK RLIMIT_MEMLOCK CAP_IPC_LOCK personality or a sysctl"),
    _f("value", "u64", INPUT, "its value from here on"),
)
LOSS_FIELDS: Final = (
    _f("index", "u64", INPUT, "after this record"),
    _f("time", "u64", INFORMATIONAL, "when the reader noticed, ns"),
    _f("lost", "u64", INPUT, "records that found no room since the last note"),
)

ROW_TABLES: Final = {"vma": VMA_FIELDS, "cover": COVER_FIELDS, "evidence": EVIDENCE_FIELDS}
TABLES: Final = {
    "sections": SECTION_FIELDS,
    "calls": CALL_FIELDS,
    "tasks": TASK_FIELDS,
    "faults": FAULT_FIELDS,
    "files": FILE_FIELDS,
    "limits": LIMIT_FIELDS,
    "losses": LOSS_FIELDS,
}
"""Name -> fields. A trace's record batch holds one row; each table is one of its columns, a list of structs."""


def c_header() -> str:
    """The constants of this module as C, for the BPF programs (bpf/ never repeats a number)."""
    lines = ["/* Generated from vmatrace/schema.py. Do not edit. */"]
    lines += [f"#define KIND_{name}\t{value}" for name, value in KINDS.items()]
    for group in (CELLS, EVIDENCE, OP_CLASSES, ROW_BITS, FILE_BITS, COVER_FLAGS, MISC):
        lines += [f"#define {name}\t{value}" for name, value in group.items()]
    lines += [
        "struct file_record {",
        "\tu64 head[8];",
        "\tu64 tag;",
        "\tchar path[FILE_PATH];",
        "\tu64 pad[7];",
        "\tu64 used;	/* this and all below is not sent */",
        "\tchar spill[256];	/* what the verifier thinks a name may run over */",
        "};",
    ]
    return "\n".join(lines) + "\n"
