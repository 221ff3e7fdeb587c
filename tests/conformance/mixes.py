"""The mixes of operations that the live agreement runs vmafuzz with: each makes other outcomes frequent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mix:
    """Options of vmafuzz; ``share``: how many of 100 runs; ``steps``: at most so many a run; ``user``: who runs it."""

    name: str
    options: tuple[str, ...]
    share: int
    steps: int = 40_000
    user: str = ""


def _ops(*words: str) -> tuple[str, str]:
    return "--ops", ",".join(words)


# What makes up the rare outcomes of most calls: three neighbours changed alike, pieces that go and come back.
_JOINS = "heal=320,return=25,bridge=25"
_LOCKS = "mmap=120,munmap=12,mprotect=60,mlock=80,mlock2=80,munlock=120,touch=40,relock=15,droppable=90"
_SMALL = "mmap=150,munmap=40,process_madvise=150,mbind=150,home_node=90,madvise=100,touch=60,heal=60"

MIXES = (
    Mix("default", (), 8),
    Mix("joins", (*_ops("default", _JOINS, "guard=25", "fork=3"), "--narrow", "60"), 20),
    Mix("narrow", (*_ops("default", "bridge=20,return=20"), "--narrow", "92"), 7),
    Mix("errors", _ops("default", "invalid=3000,rlimit=80,fork=2,name=30"), 17),
    Mix("sealed", (*_ops("default", "mseal=200,heal_sealed=280,heal=60,fork=60"), "--narrow", "40"), 8, 15_000),
    Mix("forks", (*_ops("default", "fork=60,touch=200,mdwe=12,return=220,mremap=150"), "--narrow", "60"), 6, 15_000),
    Mix("rare", (*_ops("all", "fork=1,mdwe=0,aio=22,ksm=70,uffd=0,segment=14,special=24,grow=24,personality=6"),
                 "--narrow", "50", "--overlay"), 10),
    Mix("memory", (*_ops("mmap=300,munmap=60,shm=120,mremap=200,remap_file_pages=180,mprotect=100,touch=60,aio=14"
                         ",hugetlb=14,segment=20,return=30,droppable=60"), "--overlay"), 6),
    Mix("small", (*_ops(_SMALL), "--narrow", "88"), 5),
    Mix("locks", (*_ops(_LOCKS, "lock_cycle=30,mlockall=10,munlockall=10,fork=10"), "--narrow", "93"), 5),
    Mix("nobody", (*_ops("default", "rlimit=700,mlock=60,mlock2=40"), "--narrow", "50"), 7, user="nobody"),
    # Calls whose range nobody tells make the recorder walk everything, which is too much here.
    Mix("full", (*_ops("default", "shm=0,process_madvise=0,name=0,brim=70"), "--fill", "65380", "--narrow", "50"), 2),
    Mix("uffd", ("--uffd", *_ops("default", "uffd=500,heal_uffd=160,fork=12,mlock=0,mlock2=0,mremap=150"),
                 "--narrow", "70"), 8),
)  # fmt: skip


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
