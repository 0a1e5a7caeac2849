"""Samples that show what the layers of a trained model read: a random choice keyed by the seed, a few of them at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.data.batch import source_inputs
from raysparse.data.order import Ints, shuffled
from raysparse.data.pairs import Rows
from raysparse.data.tokens import TokenFeed, TokenFile, num_windows


@dataclass(frozen=True)
class Chunk:
    """Samples that go through a model together.

    Attributes:
        number: among those of all ranks.
        inputs: what the model's forward takes.
        real: [samples, tokens] bool, False at padding; None where there is none. Of the decoder, if there is an encoder.
        source_real: [samples, source tokens] bool likewise, of what an encoder reads.
    """

    number: int
    inputs: Mapping[str, Tensor]
    real: Tensor | None = None
    source_real: Tensor | None = None

    def to(self, device: torch.device) -> "Chunk":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Chunk(self.number, inputs, *(mask if mask is None else mask.to(device) for mask in (self.real, self.source_real)))


class Samples(Protocol):
    """A pure function of which ones, so any rank may take any of them."""

    def chunk(self, number: int, index: Ints) -> Chunk:
        """Samples `index`, as the chunk of this number."""
        ...


class PairSamples:
    """Prompts, or sources, with their answers."""

    def __init__(self, rows: Rows, count: int, seed: int) -> None:
        _check(count, len(rows), "pairs of the task's train split")
        self._rows, self._pairs = rows, shuffled(0, range(count), count, len(rows), seed)

    def chunk(self, number: int, index: Ints) -> Chunk:
        pairs = self._pairs[index]
        batch = self._rows.batch(pairs, pairs)
        tokens = batch.tokens[:, : int(batch.tokens.sum(1).max())]
        ids, real = batch.input_ids[:, : tokens.shape[1]], None if bool(tokens.all()) else tokens
        if batch.source is None:
            return Chunk(number, {"input_ids": ids, "attention_mask": tokens.long()}, real)
        mask = batch.source_mask
        if mask is None:
            source, heard = batch.source, None
        else:
            mask = mask[:, : int(mask.sum(1).max())]
            source, heard = batch.source[:, : mask.shape[1]], None if bool(mask.all()) else mask
        return Chunk(number, source_inputs(source, mask) | {"decoder_input_ids": ids}, real, heard)


class TextSamples:
    """Windows of text."""

    def __init__(self, tokens: TokenFile, context: int, count: int, seed: int) -> None:
        _check(count, num_windows(tokens, context), f"windows of {context} tokens in data.train")
        self._feed = TokenFeed(tokens, context, count, seed)

    def chunk(self, number: int, index: Ints) -> Chunk:
        ids = self._feed.batch(0, index.tolist()).input_ids
        return Chunk(number, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _check(count: int, there: int, what: str) -> None:
    if count > there:
        raise ConfigError(f"Expected calibration.samples of at most {there}, the {what}. Got {count}. Lower it, or give more data.")
