"""Any pairs of texts as a task: a prompt template, and the column of the answer."""

import string
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from raysparse.data import files
from raysparse.tasks.tables import Layout, TableTask


class _Template(TableTask):
    source: str = "source"
    """Column of the source, or a template such as ``Translate to German: {en}``."""
    target: str = "target"
    """Column of the answer: a text, or a list of texts that are all right."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        try:
            fields = [field for field in string.Formatter().parse(self.source) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"source: expected a column or a template with {{column}}. Got {self.source!r}: {error}.") from None
        if any(not name or any(mark in name for mark in ".[") or form or conversion for _, name, form, conversion in fields):
            raise ValueError(f"source: expected plain column names between the braces. Got {self.source!r}. Write {{column}}.")
        return self

    @property
    def layouts(self) -> Sequence[Layout]:
        return [(*self._columns(), self.target)]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        columns = {name: files.as_text(row[name], where, name) for name in self._columns()}
        source = columns[self.source] if self.source in columns else self.source.format(**columns)
        return source, files.as_texts(row[self.target], where, self.target)

    def _columns(self) -> tuple[str, ...]:
        names = [name for _, name, _, _ in string.Formatter().parse(self.source) if name is not None]
        return tuple(dict.fromkeys(names)) or (self.source,)


class Seq2seq(_Template):
    """Source to target, a separator between them."""

    type: Literal["seq2seq"] = "seq2seq"


class Completion(_Template):
    """A text that the model goes on from: what the template says and nothing more before the answer; a long prompt loses its start."""

    type: Literal["completion"] = "completion"
    separator: str | None = ""
    """Text between the prompt and the answer."""
    cut: Literal["end", "start"] = "start"
    """Which end of a prompt is cut where it is too long for the context."""
    source: str = "prompt"
    """Column of the prompt, or a template such as ``Q: {question}\\nA:``."""
    target: str = "completion"
    """Column of the answer: a text, or a list of texts that are all right."""
