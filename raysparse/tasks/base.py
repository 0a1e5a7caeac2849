"""A downstream task: pairs of a source and the texts that would be right answers, and how answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raysparse.config import Config, ConfigError
from raysparse.data.sources import Split
from raysparse.tasks.metrics import METRICS, MetricName, missing


@dataclass(frozen=True)
class Example:
    """One source and its references, at least one; in training each reference is a pair of its own.

    Attributes:
        source: a text; of a recording, where it stands.
        subset: part of the split that is scored on its own too; "" where a task has no parts.
        audio: [samples] float32 at `data.audio.RATE`; None of a text, and of a recording that is not loaded.
    """

    source: str
    references: tuple[str, ...]
    subset: str = ""
    audio: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)


class Task(Config, ABC):
    """What a model is fine-tuned on."""

    hears: ClassVar[bool] = False
    """Whether sources are recordings."""

    separator: str | None = "\n=> "
    """Text between the prompt and the answer; it survives when a long prompt is cut. May be a special token of the tokenizer; null: its
    end of text."""
    lead: str = ""
    """Text that every answer begins with, such as a space for tokenizers that put it into the word; not part of what is scored."""
    cut: Literal["end", "start"] = "end"
    """Which end of a prompt is cut where it is too long for the context."""
    metrics: tuple[MetricName, ...] = Field(("bleu", "chrf", "rouge_l"), min_length=1)
    """Scores to report (docs/tasks.md); the first is the primary one, that comparisons judge."""
    remark: str = ""
    """Said beside every score, such as in what the data differs from a paper's."""

    @abstractmethod
    def examples(self, split: Split) -> list[Example]:
        """The examples of a split, the same at each call; examples with equal sources are one, with several references."""

    @abstractmethod
    def prompt(self, example: Example) -> str:
        """What the model reads before the separator."""

    @abstractmethod
    def baseline(self, example: Example) -> str:
        """A guess that needs no model, scored beside the model's answers."""

    @property
    def primary(self) -> MetricName:
        return self.metrics[0]

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that every answer of an encoder-decoder begins with; not part of what is scored."""
        return ()

    @property
    def told(self) -> str:
        """What is said beside the scores."""
        return self.remark

    def check_metrics(self) -> None:
        """Raise a `ConfigError` where this machine cannot compute the score that comparisons judge."""
        if reason := missing([self.primary]):
            can = ", ".join(name for name in METRICS if not missing([name]))
            raise ConfigError(
                f"Expected a primary metric that this machine can compute. Got {self.primary}, which {reason[self.primary]}. "
                f"Install that, or begin task.metrics with one of {can}."
            )


def merged(examples: Iterable[Example]) -> list[Example]:
    """Examples with equal sources become one, in order of first appearance; every reference is kept."""
    references: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        references.setdefault((example.source, example.subset), []).extend(example.references)
    return [Example(source, tuple(found), subset) for (source, subset), found in references.items()]
