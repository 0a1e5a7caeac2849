"""Translation: a text to the same text in another language."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from raysparse.data import files
from raysparse.tasks.base import Example
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, TableTask

_WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my")


class Translation(TableTask):
    """One column to another, or one entry of the column `translation` to another, as the WMT sets of the hub have it."""

    merges: ClassVar[bool] = False

    type: Literal["translation"] = "translation"
    source: str
    """Column of the text to translate, such as ``en``."""
    target: str
    """Column of its translation, such as ``de``: a text, or a list of texts that are all right."""
    prefix: str = ""
    """Said before every text; T5's is ``translate English to German: ``."""
    metrics: tuple[MetricName, ...] = ("bleu", "chrf")
    """sacreBLEU, as SquareHead reports it, and chrF. Of languages that write without spaces bleu_zh or bleu_char instead."""

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        if self.target in _WITHOUT_SPACES and "bleu" in self.metrics:
            better = "bleu_zh" if self.target == "zh" else "bleu_char"
            raise ValueError(
                f"Expected a BLEU that finds the words of {self.target}, which is written without spaces. Got bleu, which splits at them. "
                f"Use task.metrics=[{', '.join(better if name == 'bleu' else name for name in self.metrics)}]"
            )
        return self

    @property
    def layouts(self) -> Sequence[Layout]:
        return [(self.source, self.target), ("translation",)]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        if self.source not in row:
            row = row["translation"] or {}
            files.require_columns(f"{where}, translation", row, (self.source, self.target))
        return files.as_text(row[self.source], where, self.source), files.as_texts(row[self.target], where, self.target)

    def prompt(self, example: Example) -> str:
        return self.prefix + example.source
