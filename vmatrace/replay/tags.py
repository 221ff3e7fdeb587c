"""Addresses as the kernel takes them: on arm64 a program may put a tag into the top byte of some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# The calls of mm/ that take the tag off (untagged_addr), and from which argument; mmap, brk and the new address
# of mremap keep it.
_TAGGED: Final[Mapping[str, str]] = {
    "munmap": "addr", "mremap": "addr", "mprotect": "start", "pkey_mprotect": "start", "madvise": "start",
    "mlock": "start", "mlock2": "start", "munlock": "start", "mbind": "start", "set_mempolicy_home_node": "start",
    "mseal": "start",
}  # fmt: skip
_TAG: Final = 0xFF << 56
_KERNEL_HALF: Final = 1 << 55


def untagged(arch: str, name: str, args: dict[str, int]) -> dict[str, int]:
    """The arguments of a call without the tag of its address; an address of the kernel's half keeps its top byte."""
    key = _TAGGED.get(name) if arch == "aarch64" else None
    if key is None or args[key] & _KERNEL_HALF:
        return args
    return {**args, key: args[key] & ~_TAG}
