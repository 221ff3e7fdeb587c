"""The C that a BPF program needs about this kernel: a small header tree for bcc and one file of constants.

No kernel header is read: bcc is content with a generated tree, offsets come from BTF, and places in the kernel's
text from kallsyms.
"""

from __future__ import annotations

import bisect
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vmatrace.btf import Btf
from vmatrace.errors import CannotTrace
from vmatrace.schema import (
    CELLS,
    COVER_FLAGS,
    DECISIONS,
    EVIDENCE,
    FILE_BITS,
    KINDS,
    MISC,
    OP_CLASSES,
    PROPOSAL_BITS,
    ROLES,
    ROW_BITS,
)

KALLSYMS = Path("/proc/kallsyms")

_TYPES = """#pragma once
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
typedef signed char s8; typedef short s16; typedef int s32; typedef long long s64;
typedef u8 __u8; typedef u16 __u16; typedef u32 __u32; typedef u64 __u64;
typedef s8 __s8; typedef s16 __s16; typedef s32 __s32; typedef s64 __s64;
typedef u16 __be16; typedef u32 __be32; typedef u64 __be64; typedef u32 __wsum;
typedef u16 __le16; typedef u32 __le32; typedef u64 __le64;
typedef u64 __aligned_u64 __attribute__((aligned(8)));
typedef unsigned long uintptr_t; typedef unsigned long size_t;
#ifndef __cplusplus
typedef _Bool bool;
#endif
#define true 1
#define false 0
#define NULL ((void *)0)
#define PAGE_SIZE @page_size@
#define roundup_pow_of_two(n) (n)
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
struct pt_regs;
""".replace("@page_size@", str(os.sysconf("SC_PAGE_SIZE")))  # bcc's unit for the size of a ring buffer

_BPF_COMMON = """#pragma once
#define BPF_CLASS(code) ((code) & 0x07)
#define BPF_LD 0x00
#define BPF_LDX 0x01
#define BPF_ST 0x02
#define BPF_STX 0x03
#define BPF_ALU 0x04
#define BPF_JMP 0x05
#define BPF_RET 0x06
#define BPF_MISC 0x07
#define BPF_SIZE(code) ((code) & 0x18)
#define BPF_W 0x00
#define BPF_H 0x08
#define BPF_B 0x10
#define BPF_MODE(code) ((code) & 0xe0)
#define BPF_IMM 0x00
#define BPF_ABS 0x20
#define BPF_IND 0x40
#define BPF_MEM 0x60
#define BPF_OP(code) ((code) & 0xf0)
#define BPF_ADD 0x00
#define BPF_K 0x00
#define BPF_X 0x08
"""

_TREE: Mapping[str, str] = {
    "linux/kconfig.h": "#pragma once\n#define CONFIG_BPF_SYSCALL 1\n",
    "linux/types.h": _TYPES,
    # bcc's own helpers.h asks these; nothing of ours does. Any release with all helpers will do.
    "linux/version.h": "#pragma once\n#define KERNEL_VERSION(a, b, c) ((a) << 16 | (b) << 8 | (c))\n"
    "#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)\n",
    "linux/bpf_common.h": _BPF_COMMON,
    "linux/log2.h": "#pragma once\n",
    "linux/compiler.h": "#pragma once\n",
    "asm/page.h": "#pragma once\n#include <linux/types.h>\n",
    "uapi/linux/types.h": "#include <linux/types.h>\n",
    "uapi/linux/if_packet.h": "#pragma once\n",
    "uapi/linux/bpf.h": "",  # bcc brings its own
}

_OFFSETS: Mapping[str, str] = {
    "task_mm": "task_struct.mm",
    "task_pid": "task_struct.pid",
    "task_tgid": "task_struct.tgid",
    "task_signal": "task_struct.signal",
    "signal_live": "signal_struct.live",
    "task_exit_code": "task_struct.exit_code",
    "task_cred": "task_struct.cred",
    "cred_cap_effective": "cred.cap_effective",
    "cred_user_ns": "cred.user_ns",
    "user_ns_level": "user_namespace.level",
    "task_files": "task_struct.files",
    "files_fdt": "files_struct.fdt",
    "fdt_max_fds": "fdtable.max_fds",
    "fdt_fd": "fdtable.fd",
    "mm_mm_mt": "mm_struct.mm_mt",
    "mm_mm_users": "mm_struct.mm_users",
    "mm_map_count": "mm_struct.map_count",
    "mm_total_vm": "mm_struct.total_vm",
    "mm_locked_vm": "mm_struct.locked_vm",
    "mm_data_vm": "mm_struct.data_vm",
    "mm_stack_vm": "mm_struct.stack_vm",
    "mm_def_flags": "mm_struct.def_flags",
    "mm_flags": "mm_struct.flags",
    "mm_start_data": "mm_struct.start_data",
    "mm_end_data": "mm_struct.end_data",
    "mm_start_brk": "mm_struct.start_brk",
    "mm_brk": "mm_struct.brk",
    "range64_slot": "maple_range_64.slot",
    "arange64_slot": "maple_arange_64.slot",
    "vma_vm_start": "vm_area_struct.vm_start",
    "vma_vm_end": "vm_area_struct.vm_end",
    "vma_vm_flags": "vm_area_struct.vm_flags",
    "vma_vm_pgoff": "vm_area_struct.vm_pgoff",
    "vma_vm_file": "vm_area_struct.vm_file",
    "vma_vm_ops": "vm_area_struct.vm_ops",
    "vma_anon_vma": "vm_area_struct.anon_vma",
    "vma_anon_vma_chain": "vm_area_struct.anon_vma_chain",
    "vm_ops_close": "vm_operations_struct.close",
    "file_f_inode": "file.f_inode",
    "file_f_op": "file.f_op",
    "file_f_path": "file.f_path",
    "file_f_mode": "file.f_mode",
    "fops_mmap": "file_operations.mmap",
    "fops_get_unmapped_area": "file_operations.get_unmapped_area",
    "vfsmount_mnt_flags": "vfsmount.mnt_flags",
    "shmem_seals": "shmem_inode_info.seals",
    "shmem_vfs_inode": "shmem_inode_info.vfs_inode",
    "inode_i_ino": "inode.i_ino",
    "inode_i_sb": "inode.i_sb",
    "inode_i_mode": "inode.i_mode",
    "sb_s_dev": "super_block.s_dev",
    "sb_s_magic": "super_block.s_magic",
    "sb_s_iflags": "super_block.s_iflags",
    "dentry_d_name": "dentry.d_name",
    "dentry_d_parent": "dentry.d_parent",
    "dentry_d_hash": "dentry.d_hash",
    "dentry_d_inode": "dentry.d_inode",
    "mount_mnt": "mount.mnt",
    "mount_mnt_parent": "mount.mnt_parent",
    "mount_mnt_mountpoint": "mount.mnt_mountpoint",
    "unmapped_length": "vm_unmapped_area_info.length",
    "kmem_cache_name": "kmem_cache.name",
}
_OPTIONAL: Mapping[str, str] = {
    "fops_mmap_prepare": "file_operations.mmap_prepare",
    "backing_user_path": "backing_file.user_path",
    "vma_vm_policy": "vm_area_struct.vm_policy",
    "vma_vm_userfaultfd_ctx": "vm_area_struct.vm_userfaultfd_ctx",
    "vma_anon_name": "vm_area_struct.anon_name",
    "vma_anon_pgoff_lo": "vm_area_struct.__vm_anon_pgoff_lo",
    "vma_anon_pgoff_hi": "vm_area_struct.__vm_anon_pgoff_hi",
    "anon_name_name": "anon_vma_name.name",
    "mempolicy_mode": "mempolicy.mode",
    "mempolicy_nodes": "mempolicy.nodes",
    "mempolicy_home_node": "mempolicy.home_node",
    "mempolicy_w": "mempolicy.w",
    "kmem_cache_object_size": "kmem_cache.object_size",
}
_REGS: Mapping[str, Mapping[str, str]] = {
    "x86_64": {
        **{
            f"regs_{name}": f"pt_regs.{name}"
            for name in ("orig_ax", "sp", "di", "si", "dx", "r10", "r8", "r9", "bx", "cx", "bp", "ax")
        },
        "task_thread_status": "thread_info.status",  # thread_info is the first member of task_struct
    },
    "aarch64": {
        "regs_syscallno": "pt_regs.syscallno",
        "regs_sp": "pt_regs.sp",
        "regs_orig_x0": "pt_regs.orig_x0",
        "task_thread_flags": "thread_info.flags",
    },
}
_ARCH: Mapping[str, str] = {"x86_64": "ARCH_X86_64", "aarch64": "ARCH_ARM64"}

# Functions whose call sites tell births of VMA objects apart; a missing one has size 0.
_TEXT = ("vm_area_alloc", "vm_area_dup", "__anon_vma_prepare")
# Where VMA objects are freed. vm_area_free() ends in a jump, so its caller is the call site; which function that
# is depends on inlining and on the kernel (before 6.12 __vma_adjust() merged and do_mas_align_munmap() unmapped).
_FREERS: Mapping[str, tuple[str, ...]] = {
    "merged": ("vma_complete", "commit_merge", "__vma_adjust", "vma_expand"),
    "unmapped": ("vms_complete_munmap_vmas", "remove_vma", "remove_mt", "do_mas_align_munmap"),
    "freed": ("vm_area_free", "__split_vma", "copy_vma", "mmap_region", "__mmap_region", "do_brk_flags"),
}


def c_header() -> str:
    """The constants of the schema as C, for the BPF programs (bpf/ never repeats a number)."""
    lines = ["/* Generated from vmatrace/schema.py. Do not edit. */"]
    lines += [f"#define KIND_{name}\t{value}" for name, value in KINDS.items()]
    lines += [f"#define DECISION_{name}\t{value}" for name, value in DECISIONS.items()]
    for group in (CELLS, EVIDENCE, OP_CLASSES, ROW_BITS, FILE_BITS, ROLES, PROPOSAL_BITS, COVER_FLAGS, MISC):
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


def header_tree(into: Path) -> Path:
    """Write the header tree below ``into`` and return the folder that BCC_KERNEL_SOURCE must name."""
    for name, text in _TREE.items():
        file = into / "include" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return into


def function_names(kallsyms: Path = KALLSYMS) -> Iterator[str]:
    """The names of all functions, those of modules included; none where the kernel does not tell."""
    try:
        with kallsyms.open("rb") as symbols:
            for line in symbols:
                _, kind, name = line.split()[:3]
                if kind in b"tTwW":
                    yield name.decode()
    except (OSError, ValueError):
        return


def text_ranges(names: Iterable[str], kallsyms: Path = KALLSYMS) -> dict[str, tuple[int, int]]:
    """Address and size in bytes of kernel functions, from kallsyms; a name that is not there is left out.

    Raises `CannotTrace` where addresses are hidden (not root, or kptr_restrict).
    """
    wanted = set(names)
    addresses: list[int] = []
    found: dict[str, int] = {}
    for line in kallsyms.read_bytes().splitlines():
        address, kind, name = line.split(None, 3)[:3]
        if kind not in b"tT":
            continue
        place = int(address, 16)
        addresses.append(place)
        text = name.decode()
        if text in wanted:
            found[text] = place
    if not any(addresses):
        raise CannotTrace(f"kernel symbols, {kallsyms}: addresses are hidden", "run as root, see kernel.kptr_restrict")
    addresses.sort()
    sizes = {}
    for text, place in found.items():
        after = bisect.bisect_right(addresses, place)
        end = addresses[after] if after < len(addresses) else place + 4096
        sizes[text] = (place, end - place)
    return sizes


def kernel_constants(btf: Btf, *, ring_pages: int, max_spaces: int, user_stacks: int = 0) -> str:
    """The text of vmatrace_kernel.h for the kernel that ``btf`` describes and whose kallsyms are readable."""
    machine = platform.machine()
    if machine not in _ARCH:
        raise CannotTrace(f"architecture {machine}: not supported", "vmatrace traces x86_64 and arm64")
    offsets = {name: btf.offset(path) for name, path in {**_OFFSETS, **_REGS[machine]}.items()}
    offsets["mm_ma_root"] = btf.offset("mm_struct.mm_mt") + btf.offset("maple_tree.ma_root")
    for name, path in _OPTIONAL.items():
        struct_name, member_name = path.split(".")
        if (member := btf.member(struct_name, member_name)) is not None:
            offsets[name] = member.offset_bytes
    lines = ["/* Generated for one kernel from its BTF and kallsyms. */", f"#define {_ARCH[machine]} 1"]
    lines += [f"#define OFF_{name} {value}" for name, value in offsets.items()]
    last = max(value for name, value in offsets.items() if name.startswith("vma_"))
    lines += [
        f"#define VMA_READ_SIZE {last + 8}",
        f"#define PAGE_BYTES {os.sysconf('SC_PAGE_SIZE')}ULL",
        f"#define RING_PAGES {ring_pages}",
        f"#define MAX_SPACES {max_spaces}",
        f"#define MMAP_LOCK_WRITE {_mmap_lock_write_argument(btf)}",
        *([f"#define USER_STACKS {user_stacks}"] if user_stacks else []),
    ]
    lock = btf.member("vm_area_struct", "vm_lock")
    if lock is not None and lock.type_name.endswith("*"):
        # vm_area_alloc() and vm_area_dup() then allocate a lock object beside each VMA.
        lines.append(f"#define VMA_OBJECT_SIZE {btf.struct('vm_area_struct').size}")
    anon_name, tree = (btf.member("vm_area_struct", member) for member in ("anon_name", "shared"))
    if anon_name and tree and 0 <= anon_name.offset_bytes - tree.offset_bytes < tree.size:
        lines.append("#define VMA_NAME_IN_UNION 1")
    lines += _text_lines()
    return "\n".join(lines) + "\n"


def deaths_are_seen(btf: Btf) -> bool:
    """Whether a VMA object is freed where it dies; False: an RCU callback frees it later (6.4 to 6.14)."""
    return btf.member("vm_area_struct", "vm_rcu") is None


def _mmap_lock_write_argument(btf: Btf) -> int:
    """Position of ``write`` among the raw arguments: kernels that pass the memcg path have it one later."""
    prototype = btf.tracepoint("mmap_lock_acquire_returned")
    if prototype is None:
        raise CannotTrace("tracepoint mmap_lock_acquire_returned: not in this kernel", "run `vmatrace doctor`")
    names = [param.type_name for param in prototype.params]
    return 2 if any("char" in name for name in names) else 1


def _text_lines() -> list[str]:
    ranges = text_ranges([*_TEXT, *(name for names in _FREERS.values() for name in names)])
    lines = []
    for name in _TEXT:
        place, size = ranges.get(name, (0, 0))
        lines += [f"#define TEXT_{name} {place:#x}ULL", f"#define SIZE_{name} {size}ULL"]
    freers = []
    for kind, names in _FREERS.items():
        found = [ranges[name] for name in names if name in ranges]
        tests = [f"(site) - {place:#x}ULL < {size}ULL" for place, size in found]
        lines.append(f"#define SITE_{kind}(site) ({' || '.join(tests) or '0'})")
        freers += found
    low = min((place for place, _ in freers), default=0)
    high = max((place + size for place, size in freers), default=0)
    return [*lines, f"#define TEXT_vma_lo {low:#x}ULL", f"#define TEXT_vma_span {high - low}ULL"]


def write_headers(into: Path, btf: Btf, *, ring_pages: int, max_spaces: int, user_stacks: int = 0) -> Path:
    """Write all generated headers below ``into``; return the folder for BCC_KERNEL_SOURCE.

    ``user_stacks``: room for so many different stacks of calls; 0: none are taken.
    """
    root = header_tree(into)
    (root / "vmatrace_events.h").write_text(c_header())
    (root / "vmatrace_kernel.h").write_text(
        kernel_constants(btf, ring_pages=ring_pages, max_spaces=max_spaces, user_stacks=user_stacks)
    )
    return root
