"""A file that remembers: a header, then one JSON record a line, on the disk before anybody is told.

Lines are appended and synced; the header changes only by replacing the whole file. A last line that is torn, because its writer
died, is as if it had not been written. Of two writers the one that began last owns the file; the other finds out before it writes.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from raysparse.config import ConfigError


class Records(Sequence[dict[str, Any]]):
    """Records by their lines, read when they are asked for: as objects thousands of them would take five times the memory."""

    def __init__(self, lines: Sequence[bytes] = ()):
        self.lines = list(lines)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        found = self.lines[index]
        return json.loads(found) if isinstance(found, bytes) else list(map(json.loads, found))

    def __len__(self) -> int:
        return len(self.lines)


class Journal:
    """What the file holds.

    Attributes:
        header: the first line, with at least ``attempt`` and ``nonce``; empty where there is no file yet.
        records: the other lines, oldest first.

    Raises:
        ConfigError: the file is not a journal.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, Any] = {}
        self.records = Records()
        self._end = 0
        if path.exists():
            self._recover(path.read_bytes())

    @property
    def owned(self) -> bool:
        """Whether nobody else has begun to write since this one did, or read it."""
        with self.path.open("rb") as stream:
            return stream.read(len(self._mark)) == self._mark

    def replace(self, header: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Another file in the place of this one, all or nothing."""
        lines = list(map(_line, records))
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("wb") as stream:
                stream.writelines([_line(header), *lines])
                end = stream.tell()
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self.header, self.records, self._end = dict(header), Records(lines), end

    def append(self, record: dict[str, Any]) -> bool:
        """One more record; it is on the disk when this returns. After an error (a full disk) it is as if it had not been tried.

        Returns:
            False if another writer owns the file, which is then left alone.
        """
        line = _line(record)
        with self.path.open("r+b") as stream:  # not "a": it would make a new file where the journal was deleted
            if stream.read(len(self._mark)) != self._mark:
                return False
            stream.seek(self._end)  # a writer that begins from here on has a file of its own; this one is gone then
            stream.write(line)
            stream.truncate()  # of a line that is torn
            stream.flush()
            os.fsync(stream.fileno())
        self._end += len(line)
        self.records.lines.append(line)
        return True

    @property
    def _mark(self) -> bytes:
        """How the file begins while this writer owns it: the nonce is nobody else's."""
        return _line({"attempt": self.header["attempt"], "nonce": self.header["nonce"]})[:-2]

    def _recover(self, content: bytes) -> None:
        *lines, _torn = content.split(b"\n")
        header, versions = {}, []
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise self._unreadable(f"line {i + 1} is no JSON ({error})") from None
            if not isinstance(record, dict):
                raise self._unreadable(f"line {i + 1} is no object")
            if i == 0:
                header = record
            else:
                versions.append(record.get("version"))
                self.records.lines.append(line + b"\n")
            self._end += len(line) + 1
        if not {"attempt", "nonce"} <= header.keys():
            raise self._unreadable("its first line has no attempt and nonce")
        if versions != list(range(len(versions))):
            raise self._unreadable(f"its versions are not 0 to {len(versions) - 1} in order")
        self.header = header

    def _unreadable(self, problem: str) -> ConfigError:
        return ConfigError(
            f"Expected the journal of a topology in {self.path}. Got a file that was changed: {problem}. "
            "Restore it, or delete it: the newest checkpoint holds the same history."
        )


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(record)).encode() + b"\n"
