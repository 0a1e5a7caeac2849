"""A file that remembers: a header, then one JSON record a line, on the disk before anybody is told.

Lines are appended and synced; the header changes only by replacing the whole file. A last line that is torn, because its writer
died, is as if it had not been written. Of two writers the one that began last owns the file; the other finds out before it writes.
"""

import json
import os
import secrets
import weakref
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self, cast, overload

from raysparse.config import ConfigError


class Lines(Sequence[bytes]):
    """Lines of a file, read when they are asked for: in memory a number each. The file may be deleted, or another take its place.

    Args:
        descriptor: of the file, closed when the lines are gone.
        start: of the first line, bytes from the begin of the file.
        ends: of the lines that are known, and before them `start`.

    Raises:
        OSError: by any access, if the file ends before the line does.
    """

    def __init__(self, descriptor: int, start: int, ends: Sequence[int] = ()):
        self._descriptor, self._ends = descriptor, array("q", ends or [start])
        weakref.finalize(self, os.close, descriptor)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = self._ends[number : number + 2]
        if len(found := os.pread(self._descriptor, end - start, start)) < end - start:
            raise OSError(f"Expected {end - start} bytes of line {number + 2}. Got {len(found)}. Restore the file, or mend its storage.")
        return found

    def __len__(self) -> int:
        return len(self._ends) - 1

    def following(self, stream: IO[bytes]) -> "Lines":
        """These lines, in the file of `stream`: itself, or a copy that somebody put in its place."""
        theirs, ours = os.fstat(stream.fileno()), os.fstat(self._descriptor)
        same = (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
        return self if same else Lines(os.dup(stream.fileno()), 0, self._ends)

    def grew(self, size: int) -> None:
        """The file has a line more, of so many bytes."""
        self._ends.append(self._ends[-1] + size)


class Records(Sequence[dict[str, Any]]):
    """Records by their lines."""

    def __init__(self, lines: Sequence[bytes] = ()):
        self.lines = lines

    @classmethod
    def of(cls, text: str) -> Self:
        """The inverse of `text`."""
        return cls(text.encode().splitlines(keepends=True))

    @property
    def text(self) -> str:
        return b"".join(self.lines).decode()

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> Any:
        return Records(self.lines[index]) if isinstance(index, slice) else json.loads(self.lines[index])

    def __len__(self) -> int:
        return len(self.lines)


class Journal:
    """What the file holds.

    Attributes:
        header: the first line, with at least ``attempt`` and ``nonce``; empty where there is no file yet.
        records: the other lines, oldest first; they lie on the disk, so that a run of any length needs no more memory.

    Raises:
        ConfigError: the file is not a journal.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, Any] = {}
        self._lines: Sequence[bytes] = ()
        self._end = 0
        if path.exists():
            self._recover()

    @property
    def records(self) -> Records:
        return Records(self._lines)

    @property
    def owned(self) -> bool:
        """Whether nobody else has begun to write since this one did, or read it."""
        with self.path.open("rb") as stream:
            return stream.read(len(self._mark)) == self._mark

    def replace(self, header: Mapping[str, Any], records: Records) -> None:
        """Another file in the place of this one, all or nothing."""
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("wb") as stream:
                stream.write(line(header))
                lines = Lines(os.open(partial, os.O_RDONLY), stream.tell())
                for record in records.lines:
                    stream.write(record)
                    lines.grew(len(record))
                end = stream.tell()
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self.header, self._lines, self._end = dict(header), lines, end

    def append(self, record: dict[str, Any]) -> bool:
        """One more record; it is on the disk when this returns. After an error (a full disk) it is as if it had not been tried.

        Returns:
            False if another writer owns the file, which is then left alone.
        """
        written = line(record)
        with self.path.open("r+b") as stream:  # not "a": it would make a new file where the journal was deleted
            if stream.read(len(self._mark)) != self._mark:
                return False
            stream.seek(self._end)  # a writer that begins from here on has a file of its own; this one is gone then
            stream.write(written)
            stream.truncate()  # of a line that is torn
            stream.flush()
            os.fsync(stream.fileno())
            lines = cast(Lines, self._lines).following(stream)
        self._end += len(written)
        lines.grew(len(written))
        self._lines = lines
        return True

    @property
    def _mark(self) -> bytes:
        """How the file begins while this writer owns it: the nonce is nobody else's."""
        return line({"attempt": self.header["attempt"], "nonce": self.header["nonce"]})[:-2]

    def _recover(self) -> None:
        with self.path.open("rb") as stream:  # of one file, whatever takes its place meanwhile
            *lines, _torn = stream.read().split(b"\n")
            known = Lines(os.dup(stream.fileno()), len(lines[0]) + 1 if lines else 0)
        header, versions = {}, []
        for i, found in enumerate(lines):
            try:
                record = json.loads(found)
            except ValueError as error:
                raise self._unreadable(f"line {i + 1} is no JSON ({error})") from None
            if not isinstance(record, dict):
                raise self._unreadable(f"line {i + 1} is no object")
            if i == 0:
                header = record
            else:
                versions.append(record.get("version"))
                known.grew(len(found) + 1)
            self._end += len(found) + 1
        if not {"attempt", "nonce"} <= header.keys():
            raise self._unreadable("its first line has no attempt and nonce")
        if versions != list(range(len(versions))):
            raise self._unreadable(f"its versions are not 0 to {len(versions) - 1} in order")
        self.header, self._lines = header, known

    def _unreadable(self, problem: str) -> ConfigError:
        return ConfigError(
            f"Expected the journal of a topology in {self.path}. Got a file that was changed: {problem}. "
            "Restore it, or delete it: the newest checkpoint holds the same history."
        )


def line(record: Mapping[str, Any]) -> bytes:
    """A record as it stands in a journal."""
    return json.dumps(dict(record)).encode() + b"\n"
