"""What the training loop eats: a batch is a function of one integer, the same at any world size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not predicted (padding, the source of a pair)."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a global batch.

    Attributes:
        input_ids: [rows, length] int64.
        labels: [rows, length] int64, already shifted: ``labels[b, t]`` is the token that follows ``input_ids[b, :t + 1]``,
            or `IGNORED`.
    """

    input_ids: Tensor
    labels: Tensor

    def rows(self, start: int, stop: int) -> "Batch":
        return Batch(self.input_ids[start:stop], self.labels[start:stop])

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.labels.to(device))

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> Tensor:
        """[rows, length] bool: prompt and answer, without the padding behind them: every token up to the last that predicts."""
        return (self.labels != IGNORED).flip(1).cummax(1).values.flip(1)


class Feed(Protocol):
    """A pure function of the step: no iterator state, so resuming needs one integer and any world size sees the same order."""

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Rows `rows` (indices into the global batch) of the batch of `step` (0-based)."""
        ...
