"""Translation: a text to the same text in another language."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from raysparse.data import files
from raysparse.tasks.base import Example
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, TableTask


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
    """sacreBLEU, as SquareHead reports it, and chrF."""

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
