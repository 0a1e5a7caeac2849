"""What a score is: a function of all outputs and their references, and for most of them a sum over examples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

References = Sequence[Sequence[str]]
"""``references[k]`` are the right answers to what output ``k`` answers, at least one."""


class Metric(ABC):
    """A score of the outputs for a whole split, from 0 to 100 unless its docstring gives another scale."""

    lower_is_better = False

    def missing(self) -> str | None:
        """What this machine lacks to compute it, and how to get that; None where nothing is missing."""
        return None

    @abstractmethod
    def score(self, outputs: Sequence[str], references: References) -> float: ...


class Additive(Metric):
    """A function of sums over examples: a resample of the examples is a weighted sum, so its noise can be judged."""

    @abstractmethod
    def sums(self, outputs: Sequence[str], references: References) -> NDArray[np.float64]:
        """[examples, terms]."""

    @abstractmethod
    def of_sums(self, total: NDArray[np.float64]) -> float:
        """The score, from the terms [terms] added up over examples."""

    def score(self, outputs: Sequence[str], references: References) -> float:
        return self.of_sums(self.sums(outputs, references).sum(axis=0))


class Mean(Additive):
    """100 times the mean of a value of each example."""

    @abstractmethod
    def one(self, output: str, references: Sequence[str]) -> float: ...

    def sums(self, outputs: Sequence[str], references: References) -> NDArray[np.float64]:
        return np.array([[self.one(output, right), 1.0] for output, right in zip(outputs, references, strict=True)])

    def of_sums(self, total: NDArray[np.float64]) -> float:
        return float(100 * total[0] / total[1])
