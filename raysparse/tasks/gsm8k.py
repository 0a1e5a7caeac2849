"""GSM8K (Cobbe et al. 2021): maths word problems; the answer's last line is ``#### NUMBER``."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from raysparse.config import ConfigError
from raysparse.data import files
from raysparse.tasks.base import Example, Split
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, PairFolder, TableTask

HELD_OUT = 500
"""Last problems of the training file, on which runs validate: the data has no validation split."""


class GSM8K(TableTask):
    """Question to worked answer, scored by its final number."""

    merges: ClassVar[bool] = False

    type: Literal["gsm8k"] = "gsm8k"
    separator: str | None = "\nAnswer:"
    """Text between the prompt and the answer."""
    lead: str = " "
    """Text that every answer begins with."""
    metrics: tuple[MetricName, ...] = ("gsm8k",)
    """Share of right final numbers."""

    @property
    def layouts(self) -> Sequence[Layout]:
        return [("question", "answer")]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        return files.as_text(row["question"], where, "question"), files.as_texts(row["answer"], where, "answer")

    def examples(self, split: Split) -> list[Example]:
        if split == "test" or not isinstance(self.data, PairFolder):
            return super().examples(split)
        found = super().examples("train")
        if len(found) <= HELD_OUT:
            raise ConfigError(
                f"Expected more than {HELD_OUT} training problems, of which the last {HELD_OUT} are for validation. Got {len(found)}. "
                "Lift task.max_examples, or name the files of the splits with task.data.type=files."
            )
        return found[:-HELD_OUT] if split == "train" else found[-HELD_OUT:]

    def prompt(self, example: Example) -> str:
        return f"Question: {example.source}"

    def baseline(self, example: Example) -> str:
        """The last number of the question."""
        numbers = [word.strip(".,?$%") for word in example.source.split() if word.strip(".,?$%").replace(",", "").isdigit()]
        return f"#### {numbers[-1]}" if numbers else ""
