"""What the training loop eats: a batch is a function of one integer, the same at any world size."""

from collections.abc import Callable, Sequence
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
        input_ids: [rows, length] int64; where there is an encoder, what the decoder reads.
        labels: [rows, length] int64, already shifted: ``labels[b, t]`` is the token that follows ``input_ids[b, :t + 1]``,
            or `IGNORED`.
        source: what an encoder reads: [rows, source length] int64 tokens, or [rows, bins, frames] float32 log-mel of audio.
        source_mask: [rows, source length] bool, False at padding; None for audio, all of whose frames count.
    """

    input_ids: Tensor
    labels: Tensor
    source: Tensor | None = None
    source_mask: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Batch":
        return self._each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model."""
        if self.source is None:
            return {"input_ids": self.input_ids}
        return source_inputs(self.source, self.source_mask) | {"decoder_input_ids": self.input_ids}

    @property
    def source_length(self) -> int:
        """Tokens or frames that the encoder reads of each row, padding too."""
        return 0 if self.source is None else self.source.shape[-1]

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> Tensor:
        """[rows, length] bool: prompt and answer, without the padding behind them: every token up to the last that predicts."""
        return (self.labels != IGNORED).flip(1).cummax(1).values.flip(1)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(None if tensor is None else change(tensor) for tensor in vars(self).values()))  # pyrefly: ignore[bad-argument-type]


def source_inputs(source: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a model with an encoder; see `Batch`."""
    return {"input_features": source} if mask is None else {"input_ids": source, "attention_mask": mask}


class Feed(Protocol):
    """A pure function of the step: no iterator state, so resuming needs one integer and any world size sees the same order."""

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Rows `rows` (indices into the global batch) of the batch of `step` (0-based)."""
        ...
