"""Any pairs of texts as a task: files or a data set of the hub, and which columns hold the source and the target."""

import string
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raysparse.config import Config, ConfigError
from raysparse.data import files
from raysparse.data.sources import hub_rows
from raysparse.tasks.base import Example, Split, Task, group


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

    def rows(self, split: Split, columns: tuple[str, ...]) -> Iterator[files.Row]:
        paths = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        for path in files.resolve(paths):
            yield from files.read_rows(path, columns)


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

    def rows(self, split: Split, columns: tuple[str, ...]) -> Iterator[files.Row]:
        name = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        return hub_rows(self.name, self.config, name, self.revision, True, columns)


class Pairs(Task):
    """Text to text from tables, such as E2E, WebNLG and DART: rows with equal sources are one example with several references."""

    type: Literal["pairs"] = "pairs"
    data: Annotated[PairFiles | PairHub, Field(discriminator="type")]
    """Where the rows are."""
    source: str = "source"
    """Column of the source, or a template such as ``Translate to German: {en}``."""
    target: str = "target"
    """Column of the answer: a text, or a list of texts that are all right."""
    max_examples: int | None = Field(None, gt=0)
    """Use the first this many examples of each split; null uses all."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        try:
            fields = [field for field in string.Formatter().parse(self.source) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"source: expected a column or a template with {{column}}. Got {self.source!r}: {error}.") from None
        if any(not name or any(mark in name for mark in ".[") or form or conversion for _, name, form, conversion in fields):
            raise ValueError(f"source: expected plain column names between the braces. Got {self.source!r}. Write {{column}}.")
        return self

    def examples(self, split: Split) -> list[Example]:
        pairs: list[tuple[str, str]] = []
        num_sources = set[str]()
        for where, row in self.data.rows(split, (*self._columns(), self.target)):
            source = self._source(row, where)
            num_sources.add(source)
            if self.max_examples is not None and len(num_sources) > self.max_examples:
                break
            pairs += ((source, target) for target in self._targets(row[self.target], where))
        if not pairs:
            raise ConfigError(f"Expected pairs in the {split} split. Got no rows. Check task.data.{split}.")
        return group(pairs)

    def prompt(self, example: Example) -> str:
        return example.source

    def baseline(self, example: Example) -> str:
        """The source, copied."""
        return example.source

    def _columns(self) -> tuple[str, ...]:
        names = [name for _, name, _, _ in string.Formatter().parse(self.source) if name is not None]
        return tuple(dict.fromkeys(names)) or (self.source,)

    def _source(self, row: dict[str, Any], where: str) -> str:
        columns = {name: files.as_text(row[name], where, name) for name in self._columns()}
        return columns[self.source] if self.source in columns else self.source.format(**columns)

    def _targets(self, value: Any, where: str) -> list[str]:
        targets = [files.as_text(one, where, self.target) for one in (value if isinstance(value, list) else [value])]
        if not targets or not all(target.strip() for target in targets):
            raise ConfigError(
                f"Expected a target in column {self.target!r} at {where}. Got {value!r:.80}. Remove the row or choose another column."
            )
        return targets
