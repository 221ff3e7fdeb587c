"""User stacks of calls: each one that is new is read out of the kernel's map once and gets a number in the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_PLACE = np.uint64(48)
_LOST = 0xFFFF
_ADDRESS = (1 << 48) - 1


class UserStacks:
    """Numbers the stacks of calls. ``lost``: calls whose stack found no room in the kernel's map.

    A call's word (bpf/operations/stacks.c) is the place of its stack in that map, and who called the function that
    made the call; ``read`` gives the return addresses at a place.
    """

    def __init__(self, read: Callable[[int], list[int]]) -> None:
        self.lost = 0
        self._read = read
        self._numbers: dict[int, int] = {}

    def tables(self, index: Array, words: Array) -> dict[str, dict[str, Any]]:
        """The stacks of the calls at ``index`` as tables of the trace: which each has, and those seen for the first
        time."""
        there = np.flatnonzero(words)
        if not len(there):
            return {}
        found, inverse = np.unique(words[there], return_inverse=True)
        fresh = [word for word in found.tolist() if word >> 48 != _LOST and word not in self._numbers]
        first = len(self._numbers) + 1
        self._numbers.update((word, first + at) for at, word in enumerate(fresh))
        numbers = np.array([self._numbers.get(word, 0) for word in found.tolist()], dtype=np.uint32)[inverse]
        self.lost += int((words[there] >> _PLACE == _LOST).sum())
        tables: dict[str, dict[str, Any]] = {"call_stacks": {"index": index[there], "stack": numbers}}
        if fresh:
            stacks = [self._frames(word) for word in fresh]
            tables["stacks"] = {
                "stack": np.array([self._numbers[word] for word in fresh], dtype=np.uint32),
                "frames": (
                    np.cumsum([0, *map(len, stacks)], dtype=np.int32),
                    {"address": np.array([address for stack in stacks for address in stack], dtype=np.uint64)},
                ),
            }
        return tables

    def _frames(self, word: int) -> list[int]:
        """Return addresses, innermost first; the caller of a leaf function stands where frame pointers skip it."""
        frames, caller = self._read((word >> 48) - 1), word & _ADDRESS
        if caller and frames and caller not in frames[:2]:
            frames.insert(1, caller)
        return frames
