"""Curation Corpus (Curation 2020): an article to a summary, judged by perplexity as Rae et al. 2021 and SPDF do."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from raysparse.data import files
from raysparse.tasks.base import Example, Split
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, TableTask

_log = logging.getLogger(__name__)


class Curation(TableTask):
    """Articles to summaries; rows without an article or a summary are left out, as they are there."""

    merges: ClassVar[bool] = False

    type: Literal["curation"] = "curation"
    metrics: tuple[MetricName, ...] = ("perplexity",)
    """Perplexity of the summaries; others need answers, which take longer."""

    @property
    def layouts(self) -> Sequence[Layout]:
        return [("article_content", "summary"), ("article", "summary"), ("document", "summary"), ("document", "references")]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        source, target = self._layout(row)
        return files.as_text(row[source], where, source), files.as_texts(row[target], where, target)

    def grouped(self, rows: Iterator[files.Row], split: Split) -> list[Example]:
        read = list(rows)
        whole = [(where, row) for where, row in read if all(row[name] and str(row[name]).strip() for name in self._layout(row))]
        if dropped := len(read) - len(whole):
            _log.warning("curation: %d of %d %s rows have no article or no summary and are left out", dropped, len(read), split)
        return super().grouped(iter(whole), split)

    def _layout(self, row: dict[str, Any]) -> Layout:
        return next(layout for layout in self.layouts if set(layout) <= set(row))
