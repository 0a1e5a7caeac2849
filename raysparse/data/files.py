"""Rows of local files: JSON lines, CSV, TSV, Parquet and plain text, also as .gz or .zst; errors name the file and the line.

These are the plain readers on purpose. The inference of the table readers turns the text ``NA`` of a CSV into a missing value and
refuses JSON lines whose other columns change type half-way; here a text is what the file says.
"""

import csv
import glob
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from raysparse.config import ConfigError

TEXT = (".txt", ".md", ".rst", ".py")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
_TEXT_BYTES = 16_384
_PARQUET_ROWS = 1024
"""Read at once: rows of recordings are large."""


class Place(str):
    """Where a row stands, as errors name it.

    Attributes:
        folder: what paths in the row are relative to.
    """

    folder: Path

    def __new__(cls, text: str, folder: Path) -> "Place":
        place = super().__new__(cls, text)
        place.folder = folder
        return place


Row = tuple[Place, dict[str, Any]]
"""Where the row stands (``file:line``), and its values by column."""


def resolve(patterns: Iterable[str]) -> list[Path]:
    """The files that paths and globs name, sorted within a glob; a pattern that names none is an error."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [path for path in matches if path.is_file()]
        if not files:
            raise ConfigError(
                f"Expected a file, or a glob that matches some, at {pattern!r}. Got none (looked from {Path.cwd()}). Correct the path."
            )
        found += files
    return found


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files, in order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def kind(path: Path) -> str:
    """The suffix under .gz or .zst, one of `TEXT` or `TABLES`."""
    packed = path.suffix in (".gz", ".zst")
    suffix = Path(path.stem).suffix if packed else path.suffix
    if suffix not in TEXT + TABLES or (packed and suffix == ".parquet"):
        raise ConfigError(
            f"Expected {', '.join(TEXT + TABLES)}, also .gz or .zst (not Parquet, which compresses itself). Got {path}. Convert the file."
        )
    return suffix


def read_text(path: Path) -> Iterator[str]:
    """The documents of a text file: the whole file, or, when it is long, pieces of at least 16 KiB that end at a blank line."""
    piece: list[str] = []
    size = 0
    for _, line in _lines(path):
        piece.append(line)
        size += len(line)
        if size >= _TEXT_BYTES and not line.strip():
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends."""
    return [line.rstrip("\r\n") for _, line in _lines(path)]


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, each with at least `columns`.

    Raises:
        ConfigError: a missing column, a malformed or badly encoded line, or a damaged file; names the file and the line or row.
    """
    suffix = kind(path)
    if suffix == ".jsonl":
        rows = _json_rows(path)
    elif suffix == ".parquet":
        rows = _parquet_rows(path, columns)
    elif suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, "," if suffix == ".csv" else "\t")
    else:
        raise ConfigError(f"Expected a table ({', '.join(TABLES)}) with columns {list(columns)}. Got the text file {path}. Use a table.")
    for where, row in rows:
        require_columns(where, row, columns)
        yield where, row


def require_columns(where: str, row: dict[str, Any], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in row:
            raise ConfigError(f"Expected a column {column!r} at {where}. Got the columns {sorted(row)}. Name one of them in the config.")


def as_text(value: Any, where: str, column: str) -> str:
    """A cell as text: strings as they are, numbers as written; anything else is an error."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"Expected text in column {column!r} at {where}. Got {value!r:.80}. Mend the row or choose another column.")


def as_texts(value: Any, where: str, column: str) -> list[str]:
    """A cell that holds a text or a list of them."""
    return [as_text(one, where, column) for one in (value if isinstance(value, list) else [value])]


def columns(path: Path) -> list[str]:
    """Names of a table's columns, of JSON lines those of the first row; none where it has no rows."""
    if kind(path) == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            return list(file.schema_arrow.names)
    return next((list(row) for _, row in read_rows(path, ())), [])


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"Expected one JSON object a line at {path}:{number}. Got: {error}. Mend the line.") from None
        if not isinstance(row, dict):
            raise ConfigError(f"Expected a JSON object at {path}:{number}. Got {line.strip()!r:.80}. Write one object a line.")
        yield Place(f"{path}:{number}", path.parent), row


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(
                    f"Expected {len(reader.fieldnames or ())} cells, as in the header, at {path}:{reader.line_num}. "
                    "Got another number. Quote cells that hold the delimiter."
                )
            yield Place(f"{path}:{reader.line_num}", path.parent), row
    except csv.Error as error:
        raise ConfigError(f"Expected well-formed CSV at {path}:{reader.reader.line_num}. Got: {error}. Mend the line.") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            require_columns(str(path), dict.fromkeys(file.schema_arrow.names), columns)
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(f"{path}, row {number}", path.parent), row
    except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
        raise ConfigError(f"Expected a Parquet file at {path}. Got: {error}. Write the file again.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, decoded line with its end)."""
    with _open(path) as file:
        number = 0
        while line := _read_line(file, path, number + 1):
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"Expected UTF-8 at {path}:{number}. Got: {error}. Convert the file to UTF-8.") from None
            yield number, text


def _read_line(file: IO[bytes] | gzip.GzipFile, path: Path, number: int) -> bytes:
    import zstandard

    try:
        return file.readline()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"Expected a readable file at {path}. Got, at line {number}: {error}. Fetch the file again.") from None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    import io

    import zstandard

    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        raw = path.open("rb")
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True))
    return path.open("rb")
