"""Records of the decisions layer -> columns of the table `decisions`, pointers made opaque, tables named by symbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vmatrace.capture.headers import KALLSYMS
from vmatrace.capture.ring import Cells, Places
from vmatrace.schema import CELL_BYTES, CELLS

Array = npt.NDArray[Any]
Columns = dict[str, Any]

_LENGTH = np.uint64((1 << 30) - 1)
_HALF = np.uint64(32)
_LARGEST_ERRNO = 4095


class SymbolNames:
    """Names of what kernel addresses point to, looked up once each; "?" where the kernel has no symbol."""

    def __init__(self, kallsyms: Path = KALLSYMS) -> None:
        self._kallsyms = kallsyms
        self._known: dict[int, str] = {0: ""}

    def __call__(self, addresses: Sequence[int]) -> list[str]:
        """The names of these addresses, empty for 0."""
        if unknown := {address for address in addresses if address not in self._known}:
            self._look_up(unknown)
        return [self._known[address] for address in addresses]

    def _look_up(self, unknown: set[int]) -> None:
        self._known |= dict.fromkeys(unknown, "?")
        wanted = {f"{address:016x}".encode() for address in unknown}
        with self._kallsyms.open("rb") as lines:
            for line in lines:
                if line[:16] in wanted:
                    self._known[int(line[:16], 16)] = line.split()[2].decode()


class DecisionDecoder:
    """Decodes decisions. ``hooks``: the symbol that each probe, by its number, is on; empty where it is no hook."""

    def __init__(
        self,
        cloak: Callable[[Array], Array],
        rows: Callable[[Cells, Places], Columns],
        hooks: Sequence[str],
        names: Callable[[Sequence[int]], list[str]] | None = None,
    ) -> None:
        self._cloak = cloak
        self._rows = rows
        self._hooks = list(hooks)
        self._names = names or SymbolNames()

    def __call__(self, cells: Cells, heads: Places, common: Columns) -> Columns:
        """The decisions whose head cells stand at ``heads``; ``common``: the columns that all records share."""
        cells, heads, owner = _only(cells, heads)
        tag = cells[:, 0].astype(np.uint8)
        tag[heads] = 0
        head, asked = np.ascontiguousarray(cells[heads].T), np.ascontiguousarray(cells[heads + 1].T)
        answer = head[6].view(np.int64)
        is_object = answer < -_LARGEST_ERRNO
        pointers = self._cloak(np.stack((np.where(is_object, head[6], 0), asked[5], asked[6])))
        found = {name: np.flatnonzero(tag == CELLS[f"CELL_{name}"]) for name in ("ASIDE", "NEIGHBOUR", "DESCRIPTOR")}
        pgoffs = _anon_pgoffs(cells, np.flatnonzero(tag == CELLS["CELL_ANON_PGOFF"]), owner, len(heads))
        probe = (head[1] >> np.uint64(48)).astype(np.uint8)
        return {
            **common,
            "what": (head[1] >> np.uint64(8)).astype(np.uint8),
            "probe": probe,
            "op_class": (head[1] >> np.uint64(16)).astype(np.uint8),
            "abi": (head[1] >> np.uint64(24)).astype(np.uint8),
            "nr": (head[1] >> _HALF).astype(np.uint16),
            "entered": head[7],
            "order": (asked[0] >> _HALF).astype(np.uint32),
            "result": pointers[0],
            "error": np.where(is_object, 0, answer),
            "state": (asked[0] >> np.uint64(8)).astype(np.uint8),
            "start": asked[1],
            "end": asked[2],
            "flags": asked[3],
            "pgoff": asked[4],
            "file": pointers[1],
            "anon_vma": pointers[2],
            "anon_pgoff": pgoffs[:, 0],
            "bits": (asked[0] >> np.uint64(16)).astype(np.uint16),
            "delta": asked[7].view(np.int64),
            **self._aside(cells, found["ASIDE"], owner, len(heads)),
            "rows": self._neighbours(cells, found["NEIGHBOUR"], owner, pgoffs),
            "descs": self._descriptors(cells, found["DESCRIPTOR"], owner, probe),
        }

    def _aside(self, cells: Cells, places: Places, owner: Array, many: int) -> Columns:
        uffd, policy, names = np.zeros(many, np.uint64), np.zeros(many, np.uint64), [""] * many
        owners = owner[places]
        uffd[owners] = self._cloak(cells[places, 1])
        policy[owners] = cells[places, 2]
        for at, row in zip(owners.tolist(), cells[places, 3:8], strict=True):
            names[at] = row.tobytes().split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
        return {"uffd": uffd, "policy": policy, "name": names}

    def _neighbours(self, cells: Cells, places: Places, owner: Array, pgoffs: Array) -> tuple[Array, Columns]:
        role = (cells[places, 0] >> np.uint64(8)).astype(np.uint8)
        columns = self._rows(cells, places) | {"role": role}
        columns["anon_pgoff"] = pgoffs[owner[places], role]
        return _offsets(owner[places], len(pgoffs)), columns

    def _descriptors(self, cells: Cells, places: Places, owner: Array, probe: Array) -> tuple[Array, Columns]:
        cell = np.ascontiguousarray(cells[places].T)
        pointers = self._cloak(cell[6:8])
        return _offsets(owner[places], len(probe)), {
            "start": cell[1],
            "end": cell[2],
            "pgoff": cell[3],
            "flags": cell[4],
            "ops": self._names(cell[5].tolist()),
            "private": pointers[0],
            "file": pointers[1],
            "hook": [self._hooks[number] for number in probe[owner[places]].tolist()],
            "action": (cell[0] >> np.uint64(16)).astype(np.uint8),
        }


def _only(cells: Cells, heads: Places) -> tuple[Cells, Places, Array]:
    """The cells of these records alone, where they begin now, and which record each cell is of."""
    lengths = ((cells[heads, 0] & _LENGTH).astype(np.int64) + 8) // CELL_BYTES
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(heads)), lengths)
    return cells[np.arange(len(owner)) - starts[owner] + heads[owner]], starts, owner


def _anon_pgoffs(cells: Cells, places: Places, owner: Array, many: int) -> Array:
    """anon_pgoff by record and role, 0 being the proposal; zeros where the kernel has none."""
    found = np.zeros((many, 7), np.uint64)
    found[owner[places]] = cells[places, 1:8]
    return found


def _offsets(owner: Array, many: int) -> Array:
    """List offsets (int32) of children whose parents ``owner`` are in order."""
    out = np.zeros(many + 1, dtype=np.int32)
    np.cumsum(np.bincount(owner, minlength=many), out=out[1:])
    return out
