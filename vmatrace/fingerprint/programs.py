"""A dozen tiny programs that show by behaviour which rules the running kernel follows.

They run in a bare interpreter, one child per program; each touches only its own mappings and needs no
root. `main` prints one JSON object: ``{program: {"value": ..., "text": ...}}``, where value is true, false
or null (could not be told).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Sequence

from vmatrace.fingerprint import special
from vmatrace.fingerprint.arena import (
    ANON,
    DODUMP,
    DONTDUMP,
    DONTUNMAP,
    GUARD_INSTALL,
    LIBC,
    LOCKED,
    MAYMOVE,
    MREMAP_FIXED,
    PAGE,
    PR_SET_MEMORY_MERGE,
    PR_SET_VMA,
    PRIVATE,
    READ,
    ROOM,
    SHARED,
    STACK,
    Answer,
    Arena,
    Unable,
    checked,
)

Program = Callable[[Arena], Answer]


def _shape(sizes: list[int]) -> str:
    return "+".join(map(str, sizes)) or "nothing"


def _anon_merge_fix(arena: Arena) -> Answer:
    arena.map(0, 4)
    arena.advise(2, 2, DONTDUMP)
    arena.touch(2)
    arena.advise(2, 2, DODUMP)
    sizes = arena.sizes()
    return sizes == [4], f"unfaulted 2 and faulted 2 pages made alike: {_shape(sizes)}"


def _vmg(arena: Arena) -> Answer:
    arena.map(0, 2)
    arena.touch(0)
    arena.map(4, 2)
    arena.touch(4)
    arena.map(2, 2)
    sizes = arena.sizes()
    if sizes not in ([4, 2], [2, 4]):
        return None, f"a map between two anon_vmas: {_shape(sizes)}"
    return sizes == [4, 2], f"a map between two anon_vmas: {_shape(sizes)}"


def _close_only_deleted(arena: Arena) -> Answer:
    segment = checked(LIBC.shmget(0, 4 * PAGE, 0o1600), "shmget")
    try:
        checked(LIBC.shmat(segment, arena.at(0), 0), "shmat")
    finally:
        LIBC.shmctl(segment, 0, None)
    arena.advise(0, 2, DONTDUMP)
    arena.advise(2, 1, DONTDUMP)
    sizes = arena.sizes()
    return sizes == [3, 1], f"shared memory segment, edge moved: {_shape(sizes)}"


def _mprotect_drops_account(arena: Arena) -> Answer:
    arena.map(0, 2)
    if "ac" not in arena.areas()[0].flags:
        return None, "a fresh writable mapping is not accounted"
    arena.protect(0, 2, READ)
    kept = "ac" in arena.areas()[0].flags
    return not kept, f"unfaulted and made read-only: ac {'kept' if kept else 'dropped'}"


def _map_stack_nohuge(arena: Arena) -> Answer:
    if not os.path.isdir("/sys/kernel/mm/transparent_hugepage"):
        return None, "no THP in this kernel"
    arena.map(0, 2, STACK)
    found = "nh" in arena.areas()[0].flags
    return found, f"MAP_STACK: nh {'set' if found else 'not set'}"


def _guard_regions(arena: Arena) -> Answer:
    arena.map(0, 2)
    found = LIBC.madvise(arena.at(0), PAGE, GUARD_INSTALL) == 0
    return found, f"MADV_GUARD_INSTALL {'works' if found else 'is refused'}"


def _sticky_flags(arena: Arena) -> Answer:
    arena.map(0, 2)
    if LIBC.madvise(arena.at(0), PAGE, GUARD_INSTALL) != 0:
        return None, "no guard regions"
    if "gu" not in arena.areas()[0].flags:
        return False, "a VMA with a guard page shows no gu"
    arena.map(2, 2)
    areas = arena.areas()
    sizes = [area.end - area.start for area in areas]
    merged = sizes == [4] and "gu" in areas[0].flags
    return merged, f"a map beside a guard VMA (gu): {_shape(sizes)}"


def _guard_av_anon_only(arena: Arena) -> Answer:
    fd = os.memfd_create("guard")
    os.ftruncate(fd, 4 * PAGE)
    arena.map(0, 2, SHARED, fd)
    if LIBC.madvise(arena.at(0), PAGE, GUARD_INSTALL) != 0:
        return False, "no guard regions in shared files"

    def child() -> Answer:
        arena.map(2, 2, SHARED, fd, at=2)
        sizes = arena.sizes()
        return sizes == [4], f"fork child, map beside a shared file's guard VMA: {_shape(sizes)}"

    return _in_child(child)


def _dontunmap_drops_account(arena: Arena) -> Answer:
    arena.map(0, 2)
    arena.touch(0)
    arena.move(0, 2, 20, DONTUNMAP)
    kept = "ac" in arena.areas(0, 2)[0].flags
    return not kept, f"source of MREMAP_DONTUNMAP: ac {'kept' if kept else 'dropped'}"


def _dontunmap_splits_locked(arena: Arena) -> Answer:
    arena.map(0, 6, LOCKED)
    arena.move(0, 2, 20, DONTUNMAP)
    areas = arena.areas(0, 6)
    sizes = [area.end - area.start for area in areas]
    rest_locked = "lo" in areas[-1].flags
    text = f"2 of 6 locked pages moved by MREMAP_DONTUNMAP: {_shape(sizes)}"
    return rest_locked, f"{text}, the rest {'stays locked' if rest_locked else 'is unlocked'}"


def _dontunmap_resets_pgoff(arena: Arena) -> Answer:
    arena.map(0, 2)
    arena.touch(0)
    arena.move(0, 2, 20)
    arena.move(20, 2, 40, DONTUNMAP)
    arena.map(22, 2)
    sizes = arena.sizes(20, 4)
    return sizes == [4], f"a map beside the source that MREMAP_DONTUNMAP left: {_shape(sizes)}"


def _no_dontunmap_self_merge(arena: Arena) -> Answer:
    arena.map(0, 4)
    arena.move(0, 4, 4, DONTUNMAP)
    sizes = arena.sizes()
    return sizes == [4, 4], f"MREMAP_DONTUNMAP of 4 unfaulted pages to their own end: {_shape(sizes)}"


def _ksm_opt_in(_arena: Arena) -> Answer:
    found = LIBC.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) == 0
    return found, f"PR_SET_MEMORY_MERGE {'works' if found else 'is refused'}"


def _early_ksm_flag(arena: Arena) -> Answer:
    if LIBC.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) != 0:
        return None, "no PR_SET_MEMORY_MERGE"
    arena.map(0, 2)
    arena.map(2, 2)
    sizes = arena.sizes()
    return sizes == [4], f"two maps beside each other after the KSM opt-in: {_shape(sizes)}"


def _multi_vma_mremap(arena: Arena) -> Answer:
    arena.map(0, 2)
    arena.map(2, 2, prot=READ)
    result = LIBC.mremap(arena.at(0), 4 * PAGE, 4 * PAGE, MAYMOVE | MREMAP_FIXED, arena.at(20))
    moved = result == arena.at(20)
    return moved, f"mremap FIXED over two VMAs {'moves both' if moved else 'is refused'}"


def _copied_from(arena: Arena) -> Answer:
    arena.map(0, 2)
    arena.touch(0)

    def child() -> Answer:
        arena.move(0, 2, 20)
        arena.map(2, 2)
        arena.move(20, 2, 0)
        sizes = arena.sizes()
        return sizes == [2, 2], f"fork child, faulted VMA moved back beside an unfaulted one: {_shape(sizes)}"

    value, text = _in_child(child)
    # Where unfaulted never takes faulted, the fork child is refused for that older reason.
    return (value if _anon_merge_fix(_fresh(arena))[0] else False), text


def _fresh(arena: Arena) -> Arena:
    LIBC.munmap(arena.at(0), ROOM * PAGE)
    return arena


def _anon_pgoff(arena: Arena) -> Answer:
    fd = os.memfd_create("pgoff")
    os.ftruncate(fd, 4 * PAGE)
    arena.map(0, 2, PRIVATE, fd)
    arena.map(20, 2, PRIVATE, fd, at=2)
    arena.touch(20)
    arena.move(20, 2, 2)
    sizes = arena.sizes()
    text = f"faulted private file piece moved to its linear place: {_shape(sizes)}"
    return (sizes != [4] if _anon_merge_fix(_fresh(arena))[0] else False), text


def _mremap_count_7_1(_arena: Arena) -> Answer:
    """Fills the address space to vm.max_map_count, then shrinks one VMA by mremap."""
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as limit_file:
        limit = int(limit_file.read())
    if limit > 200_000:
        raise Unable(f"vm.max_map_count is {limit}: too many to fill")
    # Read-only pages two by two in inaccessible memory; the last call stops at the limit.
    base = checked(LIBC.mmap(None, 2 * limit * PAGE, 0, PRIVATE | ANON | 0x4000, -1, 0), "mmap")
    first = base + PAGE
    for index in range(limit):
        if LIBC.mprotect(base + (4 * index + 1) * PAGE, 2 * PAGE, READ) != 0:
            break
    else:
        raise Unable("vm.max_map_count was not reached")
    shrunk = LIBC.mremap(first, 2 * PAGE, PAGE, 0, None) == first
    return not shrunk, f"at the limit, a shrinking mremap {'works' if shrunk else 'is refused'}"


def _config_soft_dirty(arena: Arena) -> Answer:
    arena.map(0, 1)
    found = "sd" in arena.areas()[0].flags
    return found, f"a fresh mapping: sd {'set' if found else 'not set'}"


def _config_anon_vma_name(arena: Arena) -> Answer:
    arena.map(0, 1)
    name = ctypes.create_string_buffer(b"vmatrace")
    found = LIBC.prctl(PR_SET_VMA, 0, arena.at(0), PAGE, ctypes.addressof(name)) == 0
    return found, f"PR_SET_VMA_ANON_NAME {'works' if found else 'is refused'}"


def _config_thp(_arena: Arena) -> Answer:
    found = os.path.isdir("/sys/kernel/mm/transparent_hugepage")
    return found, f"/sys/kernel/mm/transparent_hugepage {'present' if found else 'absent'}"


def _in_child(program: Callable[[], Answer]) -> Answer:
    """Runs the program in a fork child, so that nothing it does lasts; a crash of it is an answer too."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            try:
                answer: Answer = program()
            except (Unable, OSError) as error:
                answer = (None, str(error))
            os.write(send, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(child, 0)
    if not raw:
        return None, f"the program ended with wait status {status}"
    value, text = json.loads(raw)
    return value, text


# In the order in which people look at them.
PROGRAMS: dict[str, Program] = {
    "vmg": _vmg,
    "anon_merge_fix": _anon_merge_fix,
    "copied_from": _copied_from,
    "sticky_flags": _sticky_flags,
    "guard_regions": _guard_regions,
    "guard_av_anon_only": _guard_av_anon_only,
    "multi_vma_mremap": _multi_vma_mremap,
    "no_dontunmap_self_merge": _no_dontunmap_self_merge,
    "dontunmap_drops_account": _dontunmap_drops_account,
    "dontunmap_splits_locked": _dontunmap_splits_locked,
    "dontunmap_resets_pgoff": _dontunmap_resets_pgoff,
    "mprotect_drops_account": _mprotect_drops_account,
    "map_stack_nohuge": _map_stack_nohuge,
    "close_only_deleted": _close_only_deleted,
    "ksm_opt_in": _ksm_opt_in,
    "early_ksm_flag": _early_ksm_flag,
    "mseal": special.mseal,
    "mseal_per_vma": special.mseal_per_vma,
    "seal_discard_by_ops": special.seal_discard_by_ops,
    "seal_bit_low": special.seal_bit_low,
    "droppable": special.droppable,
    "droppable_unlockable": special.droppable_unlockable,
    "secretmem_unlocked": special.secretmem_unlocked,
    "uffd_not_droppable": special.uffd_not_droppable,
    "uffd_modes_kept": special.uffd_modes_kept,
    "anon_pgoff": _anon_pgoff,
    "mremap_count_7_1": _mremap_count_7_1,
    "config_soft_dirty": _config_soft_dirty,
    "config_anon_vma_name": _config_anon_vma_name,
    "config_thp": _config_thp,
}


def main(names: Sequence[str]) -> None:
    """Runs the named programs, or all, and prints what they found."""
    result = {}
    for name in names or PROGRAMS:
        program = PROGRAMS[name]
        value, text = _in_child(lambda program=program: program(Arena()))  # type: ignore[misc]
        result[name] = {"value": value, "text": text}
    sys.stdout.write(json.dumps(result))
