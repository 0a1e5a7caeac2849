"""Samples that show what the layers of a trained model read: a random choice keyed by the seed, a few of them at a time."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.data.order import Ints, shuffled
from raysparse.data.pairs import PairRows
from raysparse.data.tokens import TokenFeed, TokenFile, num_windows


class Samples(Protocol):
    """A pure function of which ones, so any rank may take any of them."""

    def take(self, index: Ints) -> tuple[Tensor, Tensor | None]:
        """([samples, tokens] int64, [samples, tokens] bool that is False at padding, or None where there is none) of samples `index`."""
        ...


class PairSamples:
    """Prompts with their answers."""

    def __init__(self, rows: PairRows, count: int, seed: int) -> None:
        _check(count, len(rows), "pairs of the task's train split")
        self._rows, self._pairs = rows, shuffled(0, range(count), count, len(rows), seed)

    def take(self, index: Ints) -> tuple[Tensor, Tensor | None]:
        pairs = self._pairs[index]
        sizes = torch.from_numpy(np.diff(self._rows.first)[pairs] - 1)
        ids = self._rows.batch(pairs, pairs).input_ids[:, : int(sizes.max())]
        real = torch.arange(ids.shape[1]) < sizes.unsqueeze(1)
        return ids, None if bool(real.all()) else real


class TextSamples:
    """Windows of text."""

    def __init__(self, tokens: TokenFile, context: int, count: int, seed: int) -> None:
        _check(count, num_windows(tokens, context), f"windows of {context} tokens in data.train")
        self._feed = TokenFeed(tokens, context, count, seed)

    def take(self, index: Ints) -> tuple[Tensor, Tensor | None]:
        return self._feed.batch(0, index.tolist()).input_ids, None


def _check(count: int, there: int, what: str) -> None:
    if count > there:
        raise ConfigError(f"Expected calibration.samples of at most {there}, the {what}. Got {count}. Lower it, or give more data.")
