"""A downstream task: pairs of a source and the texts that would be right answers, and how answers are scored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import Field

from raysparse.config import Config
from raysparse.data.sources import Split
from raysparse.tasks.metrics import MetricName


@dataclass(frozen=True)
class Example:
    """One source and its references, at least one; in training each reference is a pair of its own."""

    source: str
    references: tuple[str, ...]


class Task(Config, ABC):
    """What a model is fine-tuned on."""

    separator: str = "\n=> "
    """Text between the prompt and the answer; it survives when a long prompt is cut. May be a special token of the tokenizer."""
    metrics: tuple[MetricName, ...] = Field(("bleu", "chrf", "rouge_l"), min_length=1)
    """Scores to report, all from 0 to 100; the first is the primary one, that comparisons judge."""

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


def group(pairs: list[tuple[str, str]]) -> list[Example]:
    """(source, reference) pairs to examples: equal sources become one, in order of first appearance; every pair is kept."""
    references: dict[str, list[str]] = {}
    for source, reference in pairs:
        references.setdefault(source, []).append(reference)
    return [Example(source, tuple(found)) for source, found in references.items()]
