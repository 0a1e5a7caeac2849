"""Fine-tuning data of encoder-decoders: the encoder reads the source, the decoder the answer from its first token on, and predicts it.

A source is read once, however many answers it has: rows name the source that they belong to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.data.batch import IGNORED, Batch
from raysparse.data.order import Ints
from raysparse.data.pairs import cut, encode, joined, pad_id, padded, pairs_of
from raysparse.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sources(Protocol):
    """What the encoder reads, of each example."""

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """[sources], which of them were cut."""
        ...

    @property
    def sizes(self) -> Ints:
        """[sources], tokens of each; 0 where all cost the same."""
        ...

    def read(self, index: Ints, whole: Ints) -> tuple[Tensor, Tensor | None]:
        """`Batch.source` and `Batch.source_mask` of the sources `index`, padded to the longest of `whole`."""
        ...


@dataclass(frozen=True)
class TextSources:
    """Texts.

    Attributes:
        ids: [tokens] of all of them; source k is ``ids[first[k] : first[k + 1]]``: the prompt and the end of text.
        first: [sources + 1].
        context: of the longest source.
    """

    ids: NDArray[np.int32]
    first: Ints
    context: int
    pad_id: int
    truncated: NDArray[np.bool_]

    @staticmethod
    def encode(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", task: Task, context: int) -> "TextSources":
        """Prompts are cut, at the end that ``task.cut`` tells, where they have no room in `context` with the end of text behind them."""
        truncated: list[bool] = []

        def sources() -> Iterator[list[int]]:
            for prompt in encode(tokenizer, [task.prompt(example) for example in examples]):
                truncated.append(len(prompt) >= context)
                yield [*cut(prompt, context - 1, task), tokenizer.eos_token_id]

        ids, first = joined(sources())
        return TextSources(ids, first, context, pad_id(tokenizer), np.array(truncated))

    @property
    def sizes(self) -> Ints:
        return np.diff(self.first)

    def read(self, index: Ints, whole: Ints) -> tuple[Tensor, Tensor]:
        source = torch.full((len(index), padded(self.sizes[whole], self.context)), self.pad_id)
        mask = torch.zeros(source.shape, dtype=torch.bool)
        for row, number in enumerate(index):
            tokens = self.ids[self.first[number] : self.first[number + 1]]
            source[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, : len(tokens)] = True
        return source, mask


@dataclass(frozen=True)
class Seq2seqRows:
    """Pairs of a source and an answer; see `pairs.Rows`.

    Attributes:
        of: [rows], the source of each.
        ids: [tokens] of all answers; that of row k is ``ids[first[k] : first[k + 1]]``: the first tokens, the answer, end of text.
        first: [rows + 1].
        context: of the longest `Batch.input_ids`.
    """

    sources: Sources
    of: Ints
    ids: NDArray[np.int32]
    first: Ints
    context: int
    pad_id: int
    num_truncated: int
    num_truncated_targets: int

    @staticmethod
    def encode(
        examples: Sequence[Example], sources: Sources, tokenizer: "PreTrainedTokenizerFast", task: Task, start: Sequence[int], context: int
    ) -> "Seq2seqRows":
        """Every (example, reference) is a row. All behind the first token is predicted, as transformers' recipes have it.

        Args:
            start: what the decoder begins with, see `first_tokens`.
        """
        room, num_cut = context - len(start), 0

        def answers() -> Iterator[list[int]]:
            nonlocal num_cut
            for target in encode(tokenizer, [target for _, target in pairs_of(examples, task)]):
                num_cut += len(target) > room
                yield [*start, *target[:room], tokenizer.eos_token_id]

        ids, first = joined(answers())
        of = np.repeat(np.arange(len(examples)), [len(example.references) for example in examples])
        return Seq2seqRows(sources, of, ids, first, context, pad_id(tokenizer), int(sources.truncated[of].sum()), num_cut)

    def __len__(self) -> int:
        return len(self.of)

    @property
    def sizes(self) -> Ints:
        return np.diff(self.first) + self.sources.sizes[self.of]

    def batch(self, index: Ints, whole: Ints) -> Batch:
        """See `Rows`. Padding is on the right; the decoder needs no mask there, no token that counts sees it."""
        length = padded(np.diff(self.first)[whole] - 1, self.context)
        input_ids = torch.full((len(index), length), self.pad_id)
        labels = torch.full((len(index), length), IGNORED)
        for row, number in enumerate(index):
            tokens = torch.from_numpy(self.ids[self.first[number] : self.first[number + 1]].astype(np.int64))
            input_ids[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        return Batch(input_ids, labels, *self.sources.read(self.of[index], self.of[whole]))


def first_tokens(tokenizer: "PreTrainedTokenizerFast", task: Task, start: int | None, context: int) -> list[int]:
    """What a decoder begins with: `start`, its config's ``decoder_start_token_id``, and the task's markers (Whisper's languages)."""
    if start is None:
        raise ConfigError(
            "Expected a decoder_start_token_id in the model's config. Got none. Set model.overrides={decoder_start_token_id: NUMBER}."
        )
    vocabulary = tokenizer.get_vocab()
    if unknown := [marker for marker in task.markers if marker not in vocabulary]:
        raise ConfigError(
            f"Expected a tokenizer that knows the markers of the task. Got none for {', '.join(unknown)}. "
            "Use the model's own tokenizer, or change task.language."
        )
    found = [start, *(vocabulary[marker] for marker in task.markers)]
    if len(found) > context // 2:
        raise ConfigError(
            f"Expected a context of at least {2 * len(found)}: answers begin with {len(found)} tokens. Got {context}. Raise it."
        )
    return found
