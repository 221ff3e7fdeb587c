"""Which file a pointer to a struct file meant at a moment."""

from __future__ import annotations

from bisect import bisect_right

from vmatrace.ingest.records import Records
from vmatrace.ingest.views import FileInfo
from vmatrace.schema import FILE_BITS


class KnownFiles:
    """Descriptions of files; a struct file's address may stand for several files in turn."""

    def __init__(self, records: Records) -> None:
        self.by_id: dict[int, FileInfo] = {}
        self._known: dict[int, tuple[list[int], list[int]]] = {}
        ids: dict[tuple[int, int, int, int], int] = {}
        for row in records.files:
            # An open file keeps its mode and hooks; only seals may come later.
            key = (row["file"], row["dev"], row["ino"], row["hooks"] & ~FILE_BITS["FILE_SEALED"])
            if key not in ids:
                ids[key] = len(ids) + 1
                self.by_id[ids[key]] = FileInfo(
                    ids[key], row["path"], row["dev"], row["ino"], row["mode"], row["fs_magic"], row["hooks"]
                )
            places, names = self._known.setdefault(row["file"], ([], []))
            places.append(int(row["index"]))
            names.append(ids[key])

    def find(self, pointer: int, index: int) -> int:
        """The id of the file at that address when record ``index`` was made; a large one if it is unknown."""
        places, names = self._known.get(pointer, ((), ()))
        if not names:
            return 1 << 62 | pointer >> 2
        return names[max(bisect_right(places, index) - 1, 0)]
