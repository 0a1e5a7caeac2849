"""Fine-tuning data of causal models: prompt, separator, answer, end of text in one row; only the answer is predicted.

And the order in which rows, these or those of `seq2seq`, are trained on.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from raysparse.config import ConfigError
from raysparse.data.batch import IGNORED, Batch
from raysparse.data.order import Ints, permute, shuffled, spread
from raysparse.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MULTIPLE = 8
_LOT = 10_000
"""Texts tokenized at once: what a tokenizer holds meanwhile is hundreds of bytes a token."""


class Rows(Protocol):
    """Pairs of a prompt and its answer, as one model reads them."""

    @property
    def num_truncated(self) -> int:
        """Pairs whose prompt was cut."""
        ...

    @property
    def num_truncated_targets(self) -> int:
        """Pairs whose answer was cut."""
        ...

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> Ints:
        """[rows], tokens of each: what is sorted by, so that rows of similar size share a batch."""
        ...

    def batch(self, index: Ints, whole: Ints) -> Batch:
        """Rows `index`, padded to the longest of `whole`, the global batch."""
        ...


@dataclass(frozen=True)
class PairRows:
    """Token ids of all pairs, one after the other.

    Attributes:
        ids: [tokens] of all rows; row k is ``ids[first[k] : first[k + 1]]``: prompt, separator, answer, end of text.
        first: [num_pairs + 1].
        num_prompt: [num_pairs], tokens of prompt and separator.
        num_truncated: pairs whose prompt was cut, at the end that ``task.cut`` tells, to fit the context.
        num_truncated_targets: pairs whose answer was longer than half the context and was cut to that.
    """

    ids: NDArray[np.int32]
    first: Ints
    num_prompt: Ints
    context: int
    pad_id: int
    num_truncated: int
    num_truncated_targets: int

    @staticmethod
    def encode(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", task: Task, context: int) -> "PairRows":
        """Every (example, reference) is a pair; `context` is the longest `Batch.input_ids`, one less than a whole row."""
        pairs = pairs_of(examples, task)
        separator = _separator(tokenizer, task, context)
        num_prompt: list[int] = []
        num_truncated = num_truncated_targets = 0

        def rows() -> Iterator[list[int]]:
            nonlocal num_truncated, num_truncated_targets
            prompts, targets = (encode(tokenizer, texts) for texts in zip(*pairs, strict=True))
            for prompt, target in zip(prompts, targets, strict=True):
                num_truncated_targets += len(target) > context // 2
                target = [*target[: context // 2], tokenizer.eos_token_id]
                room = context + 1 - len(separator) - len(target)
                num_truncated += len(prompt) > room
                num_prompt.append(min(len(prompt), room) + len(separator))
                yield [*cut(prompt, room, task), *separator, *target]

        ids, first = joined(rows())
        return PairRows(ids, first, np.array(num_prompt), context, pad_id(tokenizer), num_truncated, num_truncated_targets)

    def __len__(self) -> int:
        return len(self.num_prompt)

    @property
    def sizes(self) -> Ints:
        return np.diff(self.first)

    def batch(self, index: Ints, whole: Ints) -> Batch:
        """See `Rows`. The padding is on the right, where a causal model needs no mask: no token that counts sees it."""
        length = padded(self.sizes[whole] - 1, self.context)
        input_ids = torch.full((len(index), length), self.pad_id)
        labels = torch.full((len(index), length), IGNORED)
        for row, pair in enumerate(index):
            tokens = torch.from_numpy(self.ids[self.first[pair] : self.first[pair + 1]].astype(np.int64))
            size, num_prompt = len(tokens) - 1, self.num_prompt[pair]
            input_ids[row, :size] = tokens[:-1]
            labels[row, num_prompt - 1 : size] = tokens[num_prompt:]
        return Batch(input_ids, labels)


class PairFeed:
    """Training pairs, all of them once an epoch, in an order keyed by (seed, epoch). Shapes do not depend on the world size.

    Of every `window` batches the pairs are sorted by length, so that a batch holds pairs of similar length and little is padding; the
    batches of a window come in an order keyed by (seed, window).
    """

    def __init__(self, rows: Rows, sequences: int, seed: int, window: int = 1) -> None:
        self.rows, self.sequences, self.seed, self.window = rows, sequences, seed, window
        self._sorted: tuple[int, Ints] = (-1, np.empty(0, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every pair was seen, rounded up; the step that ends an epoch also begins the next."""
        return -(-len(self.rows) // self.sequences)

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """See `Feed`."""
        number, place = divmod(step, self.window)
        if self._sorted[0] != number:
            size = self.window * self.sequences
            pairs = shuffled(number, range(size), size, len(self.rows), self.seed)
            self._sorted = number, pairs[np.argsort(self.rows.sizes[pairs], kind="stable")] if self.window > 1 else pairs
        batch = int(permute(np.array([place]), np.array([number]), self.window, self.seed)[0])
        whole = self._sorted[1][batch * self.sequences : (batch + 1) * self.sequences]
        return self.rows.batch(whole[np.asarray(rows, dtype=np.int64)], whole)


class PairValidation:
    """`sequences` pairs, evenly spread over all: the same ones every time, whatever the step."""

    def __init__(self, rows: Rows, sequences: int) -> None:
        self.rows, self.sequences = rows, sequences

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """As `PairFeed.batch`."""
        whole = spread(range(self.sequences), self.sequences, len(self.rows))
        return self.rows.batch(whole[np.asarray(rows, dtype=np.int64)], whole)


def encode_prompts(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", task: Task, context: int, max_new_tokens: int
) -> list[list[int]]:
    """Prompt and separator as in training, the prompt cut where the answer would not fit the context: what `generate` takes."""
    separator = _separator(tokenizer, task, context)
    room = context - max_new_tokens - len(separator)
    if room < 1:
        raise ConfigError(
            f"Expected room for a prompt in a context of {context} tokens. Got {max_new_tokens} for the answer and "
            f"{len(separator)} for the separator. Lower max_new_tokens or raise the context."
        )
    prompts = encode(tokenizer, [task.prompt(example) for example in examples])
    return [[*cut(prompt, room, task), *separator] for prompt in prompts]


def pad_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The padding token, or where there is none the end of text: masked and without a label, so any would do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _separator(tokenizer: "PreTrainedTokenizerFast", task: Task, context: int) -> list[int]:
    if task.separator is None:
        return [tokenizer.eos_token_id]
    separator = tokenizer(task.separator, add_special_tokens=False)["input_ids"]
    if len(separator) > context // 4 or (not separator and task.cut == "end"):
        raise ConfigError(
            f"Expected task.separator of 1 to {context // 4} tokens, a quarter of the context. Got {len(separator)} in "
            f"{task.separator!r}. Change the separator or the context."
        )
    return separator


def pairs_of(examples: Sequence[Example], task: Task) -> list[tuple[str, str]]:
    """(prompt, answer) of every reference of every example."""
    if not examples:
        raise ConfigError("Expected examples to train or validate on. Got none. Check task and its max_examples.")
    pairs = [(task.prompt(example), task.lead + reference) for example in examples for reference in example.references]
    for prompt, target in pairs:
        if not target.strip():
            raise ConfigError(f"Expected a target for every prompt. Got none for {prompt!r:.80}. Remove the pair.")
    return pairs


def joined(rows: Iterable[Sequence[int]]) -> tuple[NDArray[np.int32], Ints]:
    """Rows of tokens one after the other, and where each begins; the end of the last one too. Of `rows` it holds one at a time."""
    ids, first = array("i"), array("q", [0])
    for row in rows:
        ids.extend(row)
        first.append(len(ids))
    return np.frombuffer(ids, dtype=np.int32), np.frombuffer(first, dtype=np.int64)


def padded(sizes: Ints, longest: int) -> int:
    """The largest of the sizes, rounded up to a multiple of 8, at most `longest`."""
    return min(-(-int(sizes.max()) // _MULTIPLE) * _MULTIPLE, longest)


def cut(prompt: list[int], room: int, task: Task) -> list[int]:
    """What of a prompt is left in so much room."""
    return prompt[:room] if task.cut == "end" else prompt[max(0, len(prompt) - room) :]


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> Iterator[list[int]]:
    """Ids without special tokens, a lot of texts at a time; a special token written in a text is text."""
    for first in range(0, len(texts), _LOT):
        lot = list(texts[first : first + _LOT])
        yield from tokenizer(lot, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
