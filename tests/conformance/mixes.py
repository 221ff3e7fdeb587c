"""The mixes of operations that the live agreement runs vmafuzz with: each makes other outcomes frequent."""

from __future__ import annotations

from dataclasses import dataclass

_LOCKS = "mmap=120,munmap=12,mprotect=60,mlock=120,mlock2=120,munlock=200,touch=40"
_SMALL = "mmap=150,munmap=40,pkey_mprotect=0,process_madvise=150,mbind=150,home_node=40,madvise=100,touch=60"


@dataclass(frozen=True, slots=True)
class Mix:
    """Options of vmafuzz; ``share``: how many of 100 runs; ``steps``: at most so many a run."""

    name: str
    options: tuple[str, ...]
    share: int
    steps: int = 40_000


MIXES = (
    Mix("default", (), 22),
    Mix("narrow", ("--narrow", "92"), 20),
    Mix("rare", ("--ops", "all,fork=1,mdwe=0,aio=3,ksm=8", "--ksm", "--uffd", "--narrow", "50"), 12),
    Mix("locks", ("--ops", _LOCKS + ",mlockall=15,munlockall=25", "--narrow", "93", "--mlockall"), 10),
    Mix("forks", ("--ops", "default,fork=60,touch=300,mdwe=3", "--narrow", "60"), 8, 15_000),
    Mix("errors", ("--ops", "default,invalid=400,rlimit=80,fork=2"), 10),
    Mix(
        "memory",
        ("--ops", "mmap=300,munmap=60,shm=160,mremap=250,remap_file_pages=60,mprotect=100,touch=60,aio=8,hugetlb=8"),
        6,
    ),
    Mix("small", ("--ops", _SMALL.replace("pkey_mprotect=0,", ""), "--narrow", "88"), 4),
    # Calls whose range nobody tells make the recorder walk everything, which is too much here.
    Mix("full", ("--ops", "default,shm=0,process_madvise=0,name=0", "--fill", "65400", "--narrow", "30"), 4, 30_000),
    Mix("uffd", ("--ops", "default,uffd=160,fork=2", "--uffd", "--narrow", "80"), 4),
)


def schedule(runs: int) -> list[Mix]:
    """``runs`` mixes, each as often as its share asks, spread evenly; the same list every time."""
    owed = dict.fromkeys(MIXES, 0.0)
    chosen = []
    for _ in range(runs):
        for mix in MIXES:
            owed[mix] += mix.share
        most = max(MIXES, key=lambda mix: owed[mix])
        owed[most] -= sum(mix.share for mix in MIXES)
        chosen.append(most)
    return chosen
