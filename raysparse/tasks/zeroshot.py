"""Zero-shot tasks: perplexity of a text, the last word of a passage, multiple choice, classification by a prompt."""

import math
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from raysparse.config import Config, ConfigError
from raysparse.data import files
from raysparse.data.files import Row
from raysparse.data.order import permute
from raysparse.tasks.likelihood import Likelihood


@dataclass(frozen=True)
class Item:
    """What one example asks a model.

    Attributes:
        pairs: (context, continuation) whose likelihoods are compared; of a text one pair without a context.
        gold: which of them is right.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0


class Probe(Config, ABC):
    """What a model is asked without being trained for it."""

    @abstractmethod
    def items(self) -> list[Item]:
        """The examples, the same at each call."""

    @abstractmethod
    def scores(self, items: Sequence[Item], found: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """Scores, and of each ``<name>_stderr``, its standard error."""


class _Tables(Probe):
    files: tuple[str, ...] = Field(min_length=1)
    """JSON lines, CSV, TSV or Parquet (also .gz, .zst); one path or glob, or a list."""
    max_examples: int | None = Field(None, gt=0)
    """Take the first this many; null takes all."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @abstractmethod
    def item(self, row: dict[str, Any], where: str) -> Item: ...

    def rows(self) -> Iterator[Row]:
        for path in files.resolve(self.files):
            yield from files.read_rows(path, ())

    def items(self) -> list[Item]:
        found = []
        for where, row in self.rows():
            found.append(self.item(row, where))
            if len(found) == self.max_examples:
                break
        if not found:
            raise ConfigError(f"Expected examples in {', '.join(self.files)}. Got none. Check task.files.")
        return found


class Text(Probe):
    """Perplexity of texts: every token is predicted once, the first after an end of text."""

    type: Literal["text"] = "text"
    files: tuple[str, ...] = Field(min_length=1)
    """Text files (each one text, a long one in pieces that end at a blank line), or tables; one path or glob, or a list."""
    column: str = "text"
    """Column of the texts in tables."""
    stride: int | None = Field(None, ge=1)
    """Tokens that a window predicts; smaller gives each more left context, and takes longer. null: all that the context holds, which is
    lm-evaluation-harness's rolling perplexity."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def items(self) -> list[Item]:
        texts: list[str] = []
        for path in files.resolve(self.files):
            if files.kind(path) in files.TEXT:
                texts += files.read_text(path)
            else:
                texts += [files.as_text(row[self.column], where, self.column) for where, row in files.read_rows(path, (self.column,))]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise ConfigError(f"Expected texts in {', '.join(self.files)}. Got none. Check task.files and task.column.")
        return [Item((("", text),)) for text in texts]

    def scores(self, items: Sequence[Item], found: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """Perplexity a token; word and byte perplexity and bits a byte as lm-evaluation-harness defines them: exp(-sum of
        log-probabilities / number of words or bytes), words being what white space separates."""
        texts = [item.pairs[0][1] for item in items]
        total = sum(one.logprob for (one,) in found)
        sizes = {"": sum(one.tokens for (one,) in found), "word_": sum(len(re.split(r"\s+", text)) for text in texts)}
        sizes["byte_"] = sum(len(text.encode()) for text in texts)
        scores = {f"{unit}perplexity": math.exp(min(700.0, -total / size)) for unit, size in sizes.items()}
        return scores | {"bits_per_byte": -total / sizes["byte_"] / math.log(2), "tokens": float(sizes[""])}


class LastWord(_Tables):
    """LAMBADA (Paperno et al. 2016): is the last word of a passage the likeliest, and how likely is it?"""

    type: Literal["last_word"] = "last_word"
    context: str = "context"
    """Column of the passage without its last word."""
    continuation: str = "continuation"
    """Column of the last word."""
    text: str | None = None
    """Column of whole passages, whose last word is split off; instead of the two others."""

    def item(self, row: dict[str, Any], where: str) -> Item:
        if self.text is not None:
            files.require_columns(where, row, (self.text,))
            context, _, word = files.as_text(row[self.text], where, self.text).strip().rpartition(" ")
        else:
            files.require_columns(where, row, (self.context, self.continuation))
            context = files.as_text(row[self.context], where, self.context)
            word = files.as_text(row[self.continuation], where, self.continuation).strip()
        if not word or not context.strip():
            raise ConfigError(f"Expected a passage and its last word at {where}. Got {context!r:.40} and {word!r:.40}. Mend the row.")
        return Item(((context.rstrip(" "), f" {word}"),))

    def scores(self, items: Sequence[Item], found: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """Accuracy: all tokens of the word are the likeliest ones. Perplexity: exp(-mean log-probability of the whole word)."""
        losses = np.array([-one.logprob for (one,) in found])
        perplexity = math.exp(min(700.0, losses.mean()))
        error = perplexity * losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        return _share("accuracy", [one.greedy for (one,) in found]) | {"perplexity": perplexity, "perplexity_stderr": error}


class Choices(_Tables):
    """Multiple choice: the likeliest answer to a query wins (PIQA, COPA, ARC, OpenBookQA), or the likeliest context of one continuation
    (WinoGrande, Winograd)."""

    type: Literal["choices"] = "choices"
    query: str = "query"
    """Column of the question."""
    choices: str = "choices"
    """Column of the answers, a list."""
    gold: str = "gold"
    """Column of the right answer's number, from 0."""
    contexts: str = "context_options"
    """Column of a list of contexts, in the place of `query` and `choices`."""
    continuation: str = "continuation"
    """Column of what follows each of the contexts."""
    delimiter: str = " "
    """Between a query, or a context, and what follows it."""

    def item(self, row: dict[str, Any], where: str) -> Item:
        if self.contexts in row:
            files.require_columns(where, row, (self.continuation, self.gold))
            contexts = files.as_texts(row[self.contexts], where, self.contexts)
            ends = [files.as_text(row[self.continuation], where, self.continuation)] * len(contexts)
        else:
            files.require_columns(where, row, (self.query, self.choices, self.gold))
            ends = files.as_texts(row[self.choices], where, self.choices)
            contexts = [files.as_text(row[self.query], where, self.query)] * len(ends)
        gold = row[self.gold]
        if not isinstance(gold, int) or not 0 <= gold < len(ends) or not all(end.strip() for end in ends):
            raise ConfigError(f"Expected the number of one of {len(ends)} choices, none empty, at {where}. Got {gold!r:.40}. Mend the row.")
        return Item(tuple((context, self.delimiter + end) for context, end in zip(contexts, ends, strict=True)), gold)

    def scores(self, items: Sequence[Item], found: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """Accuracy by the sum of log-probabilities; accuracy_norm by that over the characters of the answer."""
        plain, normed = [], []
        for item, own in zip(items, found, strict=True):
            sums = np.array([one.logprob for one in own])
            sizes = np.array([len(end) - len(self.delimiter) for _, end in item.pairs])
            plain.append(int(sums.argmax()) == item.gold)
            normed.append(int((sums / sizes).argmax()) == item.gold)
        return _share("accuracy", plain) | _share("accuracy_norm", normed)


class Classify(_Tables):
    """Classification by a prompt (RTE, MRPC): the likeliest word of the labels, after some solved examples."""

    type: Literal["classify"] = "classify"
    template: str
    """The prompt of an example, with columns: ``{sentence1}\\nQuestion: {sentence2} True or False?\\nAnswer:``."""
    label: str = "label"
    """Column of the label."""
    labels: dict[str, str] = Field(min_length=2)
    """Label -> its word, which follows the prompt: ``{0: " True", 1: " False"}``."""
    positive: str | None = None
    """Label whose F1 is reported too."""
    shots: int = Field(0, ge=0)
    """Solved examples before each prompt."""
    shot_files: tuple[str, ...] = ()
    """Where they are drawn from; never the files that are scored."""
    shot_separator: str = "\n\n"
    """Between them."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the drawing."""

    @field_validator("shot_files", mode="before")
    @classmethod
    def _shot_files(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("labels", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {str(label): word for label, word in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if bool(self.shots) != bool(self.shot_files):
            raise ValueError(f"Expected shots and shot_files together. Got {self.shots} shots and {len(self.shot_files)} files. Set both")
        if self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"Expected positive among the labels {', '.join(self.labels)}. Got {self.positive!r}. Correct it")
        return self

    def item(self, row: dict[str, Any], where: str) -> Item:
        prompt, gold = self._prompt(row, where)
        return Item(tuple((prompt, word) for word in self.labels.values()), gold)

    def items(self) -> list[Item]:
        found = super().items()
        if not self.shots:
            return found
        solved = []
        for path in files.resolve(self.shot_files):
            for where, row in files.read_rows(path, ()):
                prompt, gold = self._prompt(row, where)
                solved.append(prompt + list(self.labels.values())[gold])
        if len(solved) < self.shots:
            raise ConfigError(f"Expected {self.shots} examples in {', '.join(self.shot_files)}. Got {len(solved)}. Lower task.shots.")
        return [self._with_shots(item, number, solved) for number, item in enumerate(found)]

    def scores(self, items: Sequence[Item], found: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """Accuracy; F1 of the positive label: 2 true positives / (2 true positives + false positives + false negatives)."""
        chosen = [int(np.argmax([one.logprob for one in own])) for own in found]
        gold = [item.gold for item in items]
        scores = _share("accuracy", [a == b for a, b in zip(chosen, gold, strict=True)])
        if self.positive is not None:
            wanted = list(self.labels).index(self.positive)
            hits = sum(a == b == wanted for a, b in zip(chosen, gold, strict=True))
            wrong = sum((a == wanted) != (b == wanted) for a, b in zip(chosen, gold, strict=True))
            scores["f1"] = 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0
        return scores

    def _prompt(self, row: dict[str, Any], where: str) -> tuple[str, int]:
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        files.require_columns(where, row, (*names, self.label))
        label = str(row[self.label])
        if label not in self.labels:
            raise ConfigError(f"Expected a label among {', '.join(self.labels)} at {where}. Got {label!r:.40}. Complete task.labels.")
        return self.template.format(**{name: files.as_text(row[name], where, name) for name in names}), list(self.labels).index(label)

    def _with_shots(self, item: Item, number: int, solved: Sequence[str]) -> Item:
        """Examples drawn without repetition, keyed by (seed, number of the item)."""
        places = permute(np.arange(self.shots), np.full(self.shots, number), len(solved), self.seed)
        before = "".join(solved[place] + self.shot_separator for place in places)
        return Item(tuple((before + prompt, word) for prompt, word in item.pairs), item.gold)


AnyProbe = Annotated[Text | LastWord | Choices | Classify, Field(discriminator="type")]


def _share(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """A share of hits, and its standard error sqrt(p (1 - p) / (n - 1))."""
    p = sum(hits) / len(hits)
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (len(hits) - 1)) if len(hits) > 1 else math.nan}
