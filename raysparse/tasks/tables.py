"""Tasks whose rows are in tables: local files, a folder of splits, or a data set of the hub."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from raysparse.config import Config, ConfigError
from raysparse.data import files
from raysparse.data.sources import hub_rows
from raysparse.tasks.base import Example, Split, Task, merged

Layout = tuple[str, ...]
"""Columns that a task reads; one that reads several layouts takes the first whose columns are all there."""


class PairFiles(Config):
    """Local tables: JSON lines, CSV, TSV or Parquet, also compressed (.gz, .zst); each split one path or glob, or a list."""

    type: Literal["files"] = "files"
    train: tuple[str, ...]
    """Files to train on."""
    validation: tuple[str, ...]
    """Files that early stopping and searches look at."""
    test: tuple[str, ...]
    """Files for the final scores."""

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def rows(self, split: Split, layouts: Sequence[Layout]) -> Iterator[files.Row]:
        paths = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        for path in files.resolve(paths):
            yield from table_rows(path, layouts)


class PairFolder(Config):
    """A folder with a table of each split: ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``, or .csv, .tsv, .parquet (.gz, .zst)."""

    type: Literal["folder"] = "folder"
    path: str
    """The folder."""

    def rows(self, split: Split, layouts: Sequence[Layout]) -> Iterator[files.Row]:
        yield from table_rows(self.file(split), layouts)

    def file(self, name: str) -> Path:
        """The table ``name.*``, or a `ConfigError` that tells what is there."""
        folder = Path(self.path).expanduser()
        found = [path for path in sorted(folder.glob(f"{name}.*")) if any(path.name.startswith(name + kind) for kind in files.TABLES)]
        if len(found) != 1:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise ConfigError(
                f"Expected one table {name}.jsonl, .csv, .tsv or .parquet (also .gz, .zst) in {folder}. Got {len(found)}: {there}. "
                "Put it there, or name the files with task.data.type=files."
            )
        return found[0]


class PairHub(Config):
    """A data set of the Hugging Face hub, or a folder in its format."""

    type: Literal["hub"] = "hub"
    name: str
    """``owner/name`` on the hub, or a local folder."""
    config: str = "default"
    """Configuration of the data set."""
    revision: str = "main"
    """Branch, tag or commit; a commit makes a run repeatable."""
    train: str = "train"
    """Name of its split to train on."""
    validation: str = "validation"
    """Name of its split that early stopping and searches look at."""
    test: str = "test"
    """Name of its split for the final scores."""

    def rows(self, split: Split, layouts: Sequence[Layout]) -> Iterator[files.Row]:
        name = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        for where, row in hub_rows(self.name, self.config, name, self.revision, True, ()):
            layout_of(where, list(row), layouts)
            yield where, row


Tables = Annotated[PairFiles | PairFolder | PairHub, Field(discriminator="type")]


class TableTask(Task):
    """A task over the rows of tables."""

    merges: ClassVar[bool] = True
    """Whether rows with equal sources are one example; else every row is one."""

    data: Tables
    """Where the rows are."""
    max_examples: int | None = Field(None, gt=0)
    """Use the first this many examples of each split; null uses all."""

    @property
    @abstractmethod
    def layouts(self) -> Sequence[Layout]:
        """The sets of columns that `read` understands, at least one."""

    @abstractmethod
    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        """A row's source and its references; `where` names it in errors."""

    def subset(self, row: dict[str, Any]) -> str:
        """Part of the split that the row belongs to."""
        return ""

    def is_trained_on(self, reference: int, row: dict[str, Any]) -> bool:
        """Whether a reference of a row is good enough for training; all of them are scored against."""
        return True

    def examples(self, split: Split) -> list[Example]:
        found = self.grouped(self.data.rows(split, self.layouts), split)
        if not found:
            raise ConfigError(f"Expected pairs in the {split} split. Got no rows. Check task.data.{split}.")
        return found

    def grouped(self, rows: Iterator[files.Row], split: Split) -> list[Example]:
        """The first `max_examples` examples of rows."""
        found: list[Example] = []
        sources = set[str]()
        for where, row in rows:
            source, references = self.read(row, where)
            sources.add(source)
            if self.max_examples is not None and (len(sources) if self.merges else len(found) + 1) > self.max_examples:
                break
            if not references or not all(reference.strip() for reference in references):
                raise ConfigError(f"Expected a target, none of them empty, at {where}. Got {references!r:.80}. Mend the row or remove it.")
            kept = tuple(text for number, text in enumerate(references) if split != "train" or self.is_trained_on(number, row))
            if kept:
                found.append(Example(source, kept, self.subset(row)))
        return merged(found) if self.merges else found

    def prompt(self, example: Example) -> str:
        return example.source

    def baseline(self, example: Example) -> str:
        """The source, copied."""
        return example.source


def table_rows(path: Path, layouts: Sequence[Layout]) -> Iterator[files.Row]:
    """The rows of a table with the columns of the first layout that it has."""
    columns = files.columns(path)
    return files.read_rows(path, layout_of(str(path), columns, layouts)) if columns else iter(())


def layout_of(where: str, columns: Sequence[str], layouts: Sequence[Layout]) -> Layout:
    for layout in layouts:
        if set(layout) <= set(columns):
            return layout
    wanted = " or ".join(", ".join(layout) for layout in layouts)
    raise ConfigError(f"Expected the columns {wanted} at {where}. Got the columns {sorted(columns)}. Rename them, or name others.")
