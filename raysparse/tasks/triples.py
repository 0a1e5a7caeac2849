"""WebNLG 2017 and DART: triples of subject, property and object to a text, in LoRA's form."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from raysparse.config import ConfigError
from raysparse.data import files
from raysparse.tasks.base import Example, Split
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, PairFolder, TableTask, table_rows

SEEN = ("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University", "WrittenWork")
"""Categories of WebNLG 2017 that its training split has; the test split has others too (Gardent et al. 2017)."""


class _Triples(TableTask):
    merges: ClassVar[bool] = False

    separator: str | None = None
    """Text between the prompt and the answer; null: the tokenizer's end of text, as in LoRA."""
    lead: str = " "
    """Text that every answer begins with."""
    metrics: tuple[MetricName, ...] = ("webnlg_bleu", "webnlg_meteor", "webnlg_ter")
    """The scores of WebNLG's script, which DART takes too."""


class WebNLG(_Triples):
    """WebNLG 2017 (Gardent et al. 2017). Training takes the references that the data calls good, scores are against all; seen and unseen
    categories are scored on their own too."""

    type: Literal["webnlg"] = "webnlg"

    @property
    def layouts(self) -> Sequence[Layout]:
        return [("triples", "references", "comments", "category"), ("modified_triple_sets", "lex", "category")]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        if "lex" in row:
            return linearized(row["modified_triple_sets"]["mtriple_set"][0], where), files.as_texts(row["lex"]["text"], where, "lex.text")
        return linearized(row["triples"], where), files.as_texts(row["references"], where, "references")

    def subset(self, row: dict[str, Any]) -> str:
        return "seen" if row["category"] in SEEN else "unseen"

    def is_trained_on(self, reference: int, row: dict[str, Any]) -> bool:
        return (row["lex"]["comment"] if "lex" in row else row["comments"])[reference] == "good"


class Dart(_Triples):
    """DART 1.1.1 (Nan et al. 2021)."""

    type: Literal["dart"] = "dart"
    resplit: bool = False
    """Without the official training file: train and validate on ``train_from_dev`` and ``dev_from_dev`` of the folder, a re-split of the
    official dev set. Scores are then not DART scores, and say so."""

    @property
    def layouts(self) -> Sequence[Layout]:
        return [("tripleset", "references"), ("tripleset", "annotations")]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        source = linearized(row["tripleset"], where, lower=True)
        column = "references" if "references" in row else "annotations"
        texts = row[column]
        if column == "annotations":
            texts = texts["text"] if isinstance(texts, dict) else [one["text"] for one in texts]
        texts = files.as_texts(texts, where, column)
        return source, [text for text in texts if text.strip()] or texts  # the test split has one row with an empty text beside another

    def examples(self, split: Split) -> list[Example]:
        if not self.resplit or split == "test":
            return super().examples(split)
        if not isinstance(self.data, PairFolder):
            raise ConfigError(f"Expected task.data.type=folder with task.resplit. Got {self.data.type}. Drop resplit, or name the folder.")
        name = {"train": "train_from_dev", "validation": "dev_from_dev"}[split]
        rows: Iterator[files.Row] = table_rows(self.data.file(name), self.layouts)
        return self.grouped(rows, split)

    @property
    def told(self) -> str:
        return self.remark or ("trained on a re-split of DART's dev set: not a DART score" if self.resplit else "")


def linearized(triples: Any, where: str, lower: bool = False) -> str:
    """``s : p : o | s : p : o``; `lower` is for the properties."""
    if not isinstance(triples, list) or not triples or not all(len(triple) == 3 for triple in triples):
        raise ConfigError(f"Expected a list of triples of subject, property and object at {where}. Got {triples!r:.80}. Mend the row.")
    return " | ".join(f"{subject} : {name.lower() if lower else name} : {thing}" for subject, name, thing in triples)
