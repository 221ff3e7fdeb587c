"""The system calls that shape address spaces: their numbers for each ABI, argument names and op classes.

Numbers come from the kernel's system call tables; argument names are those of its prototypes, which its
``syscalls`` tracepoints show too. Nothing here reads a trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

NATIVE: Final = 0
COMPAT: Final = 1
FAULT_NR: Final = 65535
"""Number that a write section has where no system call is in flight."""

# Name, class without OP_, argument names, numbers: x86_64, i386, arm64, arm32 (EABI); "-": not there.
_TABLE: Final = """
mmap                    MMAP    addr,len,prot,flags,fd,off               9    -    222  -
mmap2                   MMAP    addr,len,prot,flags,fd,pgoff             -    192  -    192
old_mmap                OLD_MMAP addr,len,prot,flags,fd,off              -    90   -    -
munmap                  RANGE   addr,len                                 11   91   215  91
mprotect                RANGE   start,len,prot                           10   125  226  125
pkey_mprotect           RANGE   start,len,prot,pkey                      329  380  288  394
mremap                  MREMAP  addr,old_len,new_len,flags,new_addr      25   163  216  163
brk                     BRK     brk                                      12   45   214  45
madvise                 RANGE   start,len_in,behavior                    28   219  233  220
process_madvise         VECTOR  pidfd,vec,vlen,behavior,flags            440  440  440  440
mlock                   RANGE   start,len                                149  150  228  150
mlock2                  RANGE   start,len,flags                          325  376  284  390
munlock                 RANGE   start,len                                150  151  229  151
mlockall                WHOLE   flags                                    151  152  230  152
munlockall              WHOLE   -                                        152  153  231  153
mbind                   MBIND   start,len,mode,nmask,maxnode,flags       237  274  235  319
set_mempolicy_home_node RANGE   start,len,home_node,flags                450  450  450  450
mseal                   RANGE   start,len,flags                          462  462  462  462
remap_file_pages        RANGE   start,size,prot,pgoff,flags              216  257  234  253
prctl                   PRCTL   option,arg2,arg3,arg4,arg5               157  172  167  172
ioctl                   UFFD    fd,cmd,arg                               16   54   29   54
shmat                   ATTACH  shmid,shmaddr,shmflg                     30   397  196  305
shmdt                   FROM    shmaddr                                  67   398  197  306
ipc                     OTHER   call,first,second,third,ptr,fifth        -    117  -    -
io_setup                OTHER   nr_events,ctxp                           206  245  0    243
io_destroy              FROM    ctx                                      207  246  1    244
map_shadow_stack        OTHER   addr,size,flags                          453  453  453  -
fork                    FORK    -                                        57   2    -    2
vfork                   FORK    -                                        58   190  -    190
clone                   FORK    clone_flags,newsp,parent_tidptr,child_tidptr,tls  56  120  220  120
clone3                  FORK    uargs,size                               435  435  435  435
execve                  EXEC    filename,argv,envp                       59   11   221  11
execveat                EXEC    fd,filename,argv,envp,flags              322  358  281  387
setrlimit               LIMITS  resource,rlim                            160  75   164  75
prlimit64               LIMITS  pid,resource,new_rlim,old_rlim           302  340  261  369
personality             LIMITS  personality                              135  136  92   136
setuid                  CREDENTIALS uid                                  105  213  146  213
setuid16                CREDENTIALS uid                                  -    23   -    23
setreuid                CREDENTIALS ruid,euid                            113  203  145  203
setreuid16              CREDENTIALS ruid,euid                            -    70   -    70
setresuid               CREDENTIALS ruid,euid,suid                       117  208  147  208
setresuid16             CREDENTIALS ruid,euid,suid                       -    164  -    164
capset                  CREDENTIALS header,data                          126  185  91   185
unshare                 CREDENTIALS unshare_flags                        272  310  97   337
setns                   CREDENTIALS fd,flags                             308  346  268  375
"""

# Column of _TABLE for each (architecture, ABI).
_COLUMNS: Final = {
    ("x86_64", NATIVE): 3,
    ("x86_64", COMPAT): 4,
    ("aarch64", NATIVE): 5,
    ("aarch64", COMPAT): 6,
}
_ALIASES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
# clone's last two arguments change places between these ABIs (CONFIG_CLONE_BACKWARDS).
_CLONE_BACKWARDS: Final = {("x86_64", COMPAT), ("aarch64", NATIVE), ("aarch64", COMPAT)}


@dataclass(frozen=True, slots=True)
class SystemCall:
    """One listed system call of one ABI: its name, number, class (a key of ``OP_CLASSES``) and arguments."""

    name: str
    nr: int
    op_class: str
    arguments: tuple[str, ...]


def architecture(machine: str) -> str:
    """The name used here for what ``uname -m`` or a trace calls ``machine``."""
    return _ALIASES.get(machine, machine)


@cache
def system_calls(arch: str) -> Mapping[tuple[int, int], SystemCall]:
    """The listed system calls of an architecture by (ABI, number); empty for one that is not known."""
    arch = architecture(arch)
    calls: dict[tuple[int, int], SystemCall] = {}
    for line in _TABLE.strip().splitlines():
        words = line.split()
        for abi in (NATIVE, COMPAT):
            column = _COLUMNS.get((arch, abi))
            if column is None or words[column] == "-":
                continue
            names = tuple(words[2].split(",")) if words[2] != "-" else ()
            if words[0] == "clone" and (arch, abi) in _CLONE_BACKWARDS:
                names = (*names[:3], "tls", "child_tidptr")
            nr = int(words[column])
            calls[abi, nr] = SystemCall(words[0], nr, "OP_" + words[1], names)
    return MappingProxyType(calls)


def op_classes(arch: str) -> dict[tuple[int, int], str]:
    """``(ABI, number) -> name of its class`` (a key of ``schema.OP_CLASSES``) for each listed system call."""
    return {key: call.op_class for key, call in system_calls(arch).items()}


def find_call(arch: str, abi: int, nr: int) -> SystemCall | None:
    """The listed system call of that number, or None."""
    return system_calls(arch).get((abi, nr))


def call_name(arch: str, abi: int, nr: int) -> str:
    """The call's name; ``fault`` where no call is in flight, ``syscall_N`` where it is not listed."""
    if nr == FAULT_NR:
        return "fault"
    call = find_call(arch, abi, nr)
    return call.name if call else f"syscall_{nr}"
