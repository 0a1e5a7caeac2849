"""Where training text comes from: the Python standard library on this machine, local files, or a data set of the hub."""

import hashlib
import json
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator

from raysparse.config import Config, ConfigError
from raysparse.data import files

Split = Literal["train", "validation", "test"]
HELD_OUT = 0.07
"""Share of the standard library's modules in each of the validation and test splits of the docstring task."""

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


class Source(Config, ABC):
    """A sequence of documents, the same at each call."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, none of them empty, in a fixed order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the documents change: a hash of the content for local data."""


class PythonStdlib(Source):
    """The source and text files of this interpreter's standard library: about 1,900 files, 32 MB, no download."""

    type: Literal["python_stdlib"] = "python_stdlib"
    max_bytes: int | None = Field(None, gt=0)
    """Take a fixed pseudo-random choice of files that adds up to at most this many bytes; null takes all of them."""
    exclude_task_splits: bool = True
    """Leave out the modules of the docstring task's validation and test splits: they must not be seen in pre-training."""

    def documents(self) -> Iterator[str]:
        for name in self._names():
            text = decode(stdlib_root() / name)
            if text and text.strip():
                yield text

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._names():
            content = (stdlib_root() / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def _names(self) -> list[str]:
        names = [name for name in stdlib_names() if not self.exclude_task_splits or stdlib_split(name) == "train"]
        if self.max_bytes is None:
            return names
        chosen: list[str] = []
        room = self.max_bytes
        for name in sorted(names, key=_share):
            size = (stdlib_root() / name).stat().st_size
            if size <= room:
                chosen.append(name)
                room -= size
        return sorted(chosen)


class Files(Source):
    """Local files: text, JSON lines, CSV, TSV or Parquet, also compressed (.gz, .zst)."""

    type: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Paths or globs, relative to the working directory; one or a list."""
    column: str = "text"
    """The column that holds the text; text files have none and ignore it."""

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def documents(self) -> Iterator[str]:
        for path in files.resolve(self.paths):
            if files.kind(path) in files.TEXT:
                texts = files.read_text(path)
            else:
                rows = files.read_rows(path, (self.column,))
                texts = (files.as_text(row[self.column], where, self.column) for where, row in rows)
            yield from (text for text in texts if text.strip())

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.column}\0{files.fingerprint(files.resolve(self.paths))}".encode()).hexdigest()


class Hub(Source):
    """A data set of the Hugging Face hub, or a folder in its format, read through `datasets`."""

    type: Literal["hub"] = "hub"
    name: str
    """``owner/name`` on the hub, or a local folder."""
    config: str = "default"
    """Configuration of the data set, such as a language or a snapshot."""
    split: str = "train"
    """Split of the data set; slices such as train[:10%] need streaming: false."""
    column: str = "text"
    """The column that holds the text."""
    revision: str = "main"
    """Branch, tag or commit. Only a commit makes a run repeatable: the cache cannot see that a branch moved."""
    streaming: bool = True
    """Read rows as they arrive instead of downloading everything first; bound it with data.max_tokens."""

    def documents(self) -> Iterator[str]:
        for where, row in hub_rows(self.name, self.config, self.split, self.revision, self.streaming, (self.column,)):
            text = files.as_text(row[self.column], where, self.column)
            if text.strip():
                yield text

    def fingerprint(self) -> str:
        folder = Path(self.name).expanduser()
        content = files.fingerprint(sorted(p for p in folder.rglob("*") if p.is_file())) if folder.is_dir() else ""
        return hashlib.sha256(json.dumps([self.model_dump(mode="json"), content]).encode()).hexdigest()


AnySource = Annotated[PythonStdlib | Files | Hub, Field(discriminator="type")]


def hub_rows(name: str, config: str, split: str, revision: str, streaming: bool, columns: tuple[str, ...]) -> Iterator[files.Row]:
    """Rows of a data set with at least `columns`, recordings as bytes and path; a data set, configuration or split that is not there is a
    `ConfigError`."""
    import datasets

    folder = Path(name).expanduser()
    try:
        rows = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # the last one of a script, which is not run
        raise ConfigError(
            f"Expected the data set {name!r}, configuration {config!r}, split {split!r}. Got: {error}. "
            "Check the names and the network, or use a local folder."
        ) from None
    heard = any(isinstance(feature, datasets.Audio) for feature in (rows.features or {}).values())
    if heard and isinstance(rows, datasets.IterableDataset):
        rows = rows.decode(False)  # recordings as they are stored
    for number, row in enumerate(_readable(cast(Iterable[dict[str, Any]], rows), name), start=1):
        where = files.Place(f"{name}, {split}, row {number}", folder)
        files.require_columns(where, row, columns)
        yield where, row


def _readable(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except ImportError as error:  # torchcodec, of recordings that lie beside a table
        raise ConfigError(
            f"Expected recordings inside the tables of {name!r}, as Parquet files have them. Got: {error} Use data.type=files with a table "
            "that names the recordings, or install the package."
        ) from None


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_names() -> list[str]:
    """Paths of the library's .py, .txt and .rst files, relative to its root, sorted."""
    root = stdlib_root()
    found = (path.relative_to(root) for suffix in ("py", "txt", "rst") for path in root.rglob(f"*.{suffix}"))
    return sorted(path.as_posix() for path in found if not _LEFT_OUT.intersection(path.parts))


def stdlib_split(name: str) -> Split:
    """Which split of the docstring task a file belongs to: by a hash of its path, so the same on every machine and version."""
    share = _share(name)
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def decode(path: Path) -> str | None:
    """The text, or None where it is not UTF-8: a handful of the library's files are test data for other encodings."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"module\0{name}".encode()).digest()[:8], "big") / 2**64
