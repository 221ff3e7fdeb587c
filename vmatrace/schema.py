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
    "DECISION": 10,  # a probed function of the decisions layer returned
}

CELLS: Final = {  # the low byte of a tag; all odd
    "CELL_BEFORE": 1,  # a VMA, before
    "CELL_AFTER": 3,  # a VMA, after
    "CELL_EXTRA": 5,  # rare attributes of the VMA cell just before
    "CELL_COVER": 7,  # closes a walked range
    "CELL_EVIDENCE": 9,  # one or two of: store, birth, death
    "CELL_ARGS": 11,  # six arguments
    "CELL_PROPOSAL": 13,  # what a decision was asked: range, flags, file, anon_vma
    "CELL_ASIDE": 15,  # the rest of it: uffd, policy, name
    "CELL_NEIGHBOUR": 17,  # a VMA that it looked at
    "CELL_DESCRIPTOR": 19,  # a vm_area_desc, before or after a file's hook
    "CELL_ANON_PGOFF": 21,  # anon_pgoff of the proposal, then of the VMA in each role
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
    "OP_CREDENTIALS": 16,  # may gain or lose CAP_IPC_LOCK
    "OP_ATTACH": 17,  # shmat: the second argument is where, 0 where the kernel picks the place
    "OP_FROM": 18,  # takes away VMAs from its first argument on
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
    "FILE_STACKED": 128,  # opened by a stacked file system (overlayfs) behind the file that mmap is given
}

DECISIONS: Final = {
    "MERGE_NEW": 1,  # vma_merge_new_range; before 6.12 vma_merge of a range that no VMA holds yet
    "MERGE_EXISTING": 2,  # vma_modify: the merge step of a changed range, and the cuts where it was refused
    "MERGE_EXTEND": 3,  # vma_merge_extend: growth in place
    "MERGE_COPIED": 4,  # copy_vma: the copy of a move
    "EXPAND": 5,  # vma_expand
    "SHRINK": 6,  # vma_shrink
    "SPLIT": 7,  # __split_vma
    "MMAP_PREPARE": 8,  # a file's mmap_prepare hook
    "COMPAT_MMAP": 9,  # mmap_prepare called for a file whose own hook is ->mmap
    "MMAP": 10,  # __mmap_region: a new mapping, from its flags to the end
    "UNMAP_GATHER": 11,  # vms_gather_munmap_vmas: what is to go is cut free
    "UNMAP_COMPLETE": 12,  # vms_complete_munmap_vmas: and goes
    "BRK": 13,  # do_brk_flags
    "STACK_GROWTH": 14,  # expand_downwards
    "EXEC_STACK": 15,  # create_init_stack_vma
    "RELOCATE": 16,  # relocate_vma_down: exec moves its stack
    "FORK_COPY": 17,  # dup_mmap
    "ANON_PREPARE": 18,  # __anon_vma_prepare
    "ANON_CLONE": 19,  # anon_vma_clone
    "ANON_FORK": 20,  # anon_vma_fork
    "HUGETLB_UNSHARE": 21,  # hugetlb_unshare_pmds or hugetlb_split
    "VMA_ALLOC": 22,  # vm_area_alloc
    "VMA_DUP": 23,  # vm_area_dup
    "VMA_DETACH": 24,  # vma_mark_detached
    "VMA_FREE": 25,  # vm_area_free
}

MERGE_STATES: Final = {
    "STATE_NONE": 0,  # the function has no such state, or nothing was tried
    "STATE_NOMEM": 1,
    "STATE_REFUSED": 2,
    "STATE_MERGED": 3,
}

ROLES: Final = {  # of a VMA that a decision looked at
    "ROLE_PREV": 1,
    "ROLE_MIDDLE": 2,
    "ROLE_NEXT": 3,
    "ROLE_COPIED_FROM": 4,
    "ROLE_RESULT": 5,  # the VMA it returned, as it was then
    "ROLE_SOURCE": 6,  # the VMA it was called for: cut, copied, grown, freed
}

PROPOSAL_BITS: Final = {
    "PROPOSAL_JUST_EXPAND": 1,  # looks at the left neighbour only
    "PROPOSAL_GIVE_UP_ON_OOM": 2,
    "PROPOSAL_SKIP_UPROBE": 4,
    "PROPOSAL_KEEP_SOURCE": 8,  # copy_vma: the source is not unmapped afterwards
    "PROPOSAL_NEW_BELOW": 16,  # __split_vma: the new object is the lower part
    "PROPOSAL_IN_SECTION": 32,  # inside a write section of the task
    "PROPOSAL_UNREADABLE": 64,  # a VMA or a structure could not be read
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


_f: Final = Field

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
    "OP_EXEC": "arg4: bytes of the data segment; arg5: whether CAP_IPC_LOCK holds now",
    "OP_CREDENTIALS": "arg5: whether CAP_IPC_LOCK holds now",
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
FAULT_FIELDS: Final = (*_WHEN, *_WHO, _f("in_section", "u8", INFORMATIONAL, "1: inside a write section of the task"))
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
NEIGHBOUR_FIELDS: Final = (
    *(Field(f.name, f.type, INPUT, f.doc, f.pointer) for f in VMA_FIELDS),
    _f("role", "u8", INPUT, "ROLES: which VMA it was to the decision"),
    _f("anon_pgoff", "u64", INPUT, "its anon_pgoff, pages; 0 where the kernel has none"),
)
DESCRIPTOR_FIELDS: Final = (
    _f("start", "u64", INPUT, "bytes"),
    _f("end", "u64", INPUT, "bytes, exclusive"),
    _f("pgoff", "u64", INPUT, "pages"),
    _f("flags", "u64", INPUT, "vm_flags or vma_flags"),
    _f("ops", "text", INPUT, "the vm_operations_struct by its symbol, empty: none"),
    _f("private", "u64", INPUT, "private_data or 0", pointer=True),
    _f("file", "u64", INPUT, "vm_file, what the VMA will hold", pointer=True),
    _f("hook", "text", INFORMATIONAL, "the function called, by its symbol"),
    _f("action", "u8", INPUT, "action.type: what the kernel is to do after the hook, 0: nothing"),
)
DECISION_FIELDS: Final = (
    *_WHEN,
    *_WHO,
    _f("what", "u8", INPUT, "DECISIONS"),
    _f("probe", "u8", INPUT, 'which of header["decisions"]["probes"] saw it'),
    _f("op_class", "u8", INPUT, "OP_CLASSES of the system call in flight, by the write section it is in"),
    _f("abi", "u8", INPUT, "0: native, 1: 32-bit"),
    _f("nr", "u16", INPUT, "number of the system call in flight; 65535 in a fault"),
    _f("entered", "u64", INFORMATIONAL, "when the function was called, ns; time: when it returned"),
    _f("order", "u32", INPUT, "nth call of a probed function in that address space: a gap proves a loss"),
    _f("result", "u64", PREDICTED, "the object returned; 0: none, NULL or an error", pointer=True),
    _f("error", "i64", PREDICTED, "a negative errno, or the number that the function returned"),
    _f("state", "u8", PREDICTED, "MERGE_STATES: vma_merge_struct.state at the end"),
    _f("start", "u64", INPUT, "proposal at the call: first byte; SPLIT, STACK_GROWTH: the address"),
    _f("end", "u64", INPUT, "proposal: end, exclusive; 0 where the function has none"),
    _f("pgoff", "u64", INPUT, "proposal: pages"),
    _f("flags", "u64", INPUT, "proposal: vm_flags"),
    _f("file", "u64", INPUT, "proposal: the file or 0", pointer=True),
    _f("anon_vma", "u64", INPUT, "proposal: the anon_vma or 0", pointer=True),
    _f("uffd", "u64", INPUT, "proposal: userfaultfd context or 0", pointer=True),
    _f("policy", "u64", INPUT, "proposal: NUMA policy by content, as in a VMA"),
    _f("name", "text", INPUT, "proposal: anon_name, the first 39 bytes"),
    _f("anon_pgoff", "u64", INPUT, "proposal: pages; 0 where the kernel has none"),
    _f("bits", "u32", INPUT, "PROPOSAL_BITS"),
    _f("delta", "i64", INPUT, "MERGE_EXTEND, RELOCATE: bytes; UNMAP_COMPLETE: VMAs to go"),
    _f("rows", "list<neighbour>", INPUT, "the VMAs it looked at, as at the call; ROLE_RESULT as at the end"),
    _f("descs", "list<descriptor>", INPUT, "of mmap_prepare: the descriptor before and after the hook"),
)
LIMIT_FIELDS: Final = (
    *_WHEN,
    _f("pid", "u32", INPUT, "thread group, 0: the whole machine"),
    _f("name", "text", INPUT, "RLIMIT_AS RLIMIT_DATA RLIMIT_STACK RLIMIT_MEMLOCK CAP_IPC_LOCK personality or a sysctl"),
    _f("value", "u64", INPUT, "its value from here on"),
)
FRAME_FIELDS: Final = (_f("address", "u64", INFORMATIONAL, "where the code goes on; the first: after the call"),)
STACK_FIELDS: Final = (
    _f("stack", "u32", INFORMATIONAL, "its number, from 1 on"),
    _f("frames", "list<frame>", INFORMATIONAL, "innermost first, up to 64, by frame pointers"),
)
CALL_STACK_FIELDS: Final = (
    _f("index", "u64", INFORMATIONAL, "the call with this index"),
    _f("stack", "u32", INFORMATIONAL, "its user stack in the table stacks, 0: lost"),
)
LOSS_FIELDS: Final = (
    _f("index", "u64", INPUT, "after this record"),
    _f("time", "u64", INFORMATIONAL, "when the reader noticed, ns"),
    _f("lost", "u64", INPUT, "records that found no room since the last note"),
)

ROW_TABLES: Final = {
    "vma": VMA_FIELDS,
    "cover": COVER_FIELDS,
    "evidence": EVIDENCE_FIELDS,
    "neighbour": NEIGHBOUR_FIELDS,
    "descriptor": DESCRIPTOR_FIELDS,
    "frame": FRAME_FIELDS,
}
TABLES: Final = {
    "sections": SECTION_FIELDS,
    "calls": CALL_FIELDS,
    "tasks": TASK_FIELDS,
    "faults": FAULT_FIELDS,
    "files": FILE_FIELDS,
    "limits": LIMIT_FIELDS,
    "losses": LOSS_FIELDS,
    "decisions": DECISION_FIELDS,
    "stacks": STACK_FIELDS,
    "call_stacks": CALL_STACK_FIELDS,
}
"""Name -> fields. A trace's record batch holds one row; each table is one of its columns, a list of structs."""
LAYER_TABLES: Final = {"decisions": "decisions", "stacks": "stacks", "call_stacks": "stacks"}
"""Tables that only a trace with a layer has, and that layer (``stacks``: recorded with --stacks)."""
