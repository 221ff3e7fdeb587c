"""The mixes of operations that the live agreement runs vmafuzz with: each makes other outcomes frequent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mix:
    """Options of vmafuzz; ``share``: how many of 100 runs; ``steps``: at most so many a run."""

    name: str
    options: tuple[str, ...]
    share: int
    steps: int = 40_000


MIXES = (
    Mix("default", (), 30),
    Mix("rare", ("--ops", "all,fork=1", "--ksm", "--uffd"), 15),
    Mix("locked", ("--ops", "default,mlock=150,mlock2=120,munlock=200,fork=2", "--mlockall"), 10),
    Mix("forks", ("--ops", "default,fork=60,touch=300"), 10, 15_000),
    Mix("errors", ("--ops", "default,invalid=400,rlimit=80,fork=2"), 15),
    Mix(
        "memory",
        ("--ops", "mmap=300,munmap=80,shm=160,mremap=200,remap_file_pages=60,mprotect=100,touch=60"),
        10,
    ),
    Mix("attributes", ("--ops", "mmap=150,name=200,mbind=200,home_node=60,madvise=200,mseal=40,touch=60"), 5),
    Mix("ksm", ("--ops", "default,ksm=20", "--ksm"), 3),
    Mix("uffd", ("--ops", "default,uffd=120", "--uffd"), 2),
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
