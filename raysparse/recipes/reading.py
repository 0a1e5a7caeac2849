"""How one model reads one task: as texts that go on, or by an encoder and a decoder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysparse.config import ConfigError
from raysparse.data import tokenizer as tokenizers
from raysparse.data.audio import AudioSources
from raysparse.data.pairs import PairRows, Rows, encode_prompts, pad_id
from raysparse.data.seq2seq import Seq2seqRows, Sources, TextSources, first_tokens
from raysparse.data.tokenizer import AnyTokenizer, PretrainedTokenizer
from raysparse.models.build import ModelConfig
from raysparse.models.hub_config import Kind, kind_of, position_key
from raysparse.models.presets import preset_config
from raysparse.tasks.base import Example, Task
from raysparse.tasks.generate import Beginnings, Prompts, Questions


def kinds_for(task: Task) -> tuple[Kind, ...]:
    """The models that can do a task."""
    return ("audio",) if task.hears else ("causal", "text")


@dataclass(frozen=True)
class Reader:
    """Examples to what a model trains on and what it answers.

    Attributes:
        hf_config: of the model; None of a causal one that is not there yet.
        context: tokens of the longest prompt and answer together; of an encoder-decoder, of the longest answer.
        source_context: tokens of the longest source of an encoder-decoder.
    """

    hf_config: Any
    tokenizer: Any
    task: Any
    context: int
    source_context: int

    @property
    def kind(self) -> Kind:
        return "causal" if self.hf_config is None else kind_of(self.hf_config)

    def rows(self, examples: Sequence[Example]) -> Rows:
        if self.kind == "causal":
            return PairRows.encode(examples, self.tokenizer, self.task, self.context)
        return Seq2seqRows.encode(examples, self._sources(examples), self.tokenizer, self.task, self._start(), self.context)

    def prompts(self, examples: Sequence[Example], max_new_tokens: int) -> Prompts:
        if self.kind == "causal":
            ids = encode_prompts(examples, self.tokenizer, self.task, self.context, max_new_tokens)
            return Beginnings(ids, pad_id(self.tokenizer))
        start, key = self._start(), position_key(self.hf_config)
        if key is not None and len(start) + max_new_tokens > (room := getattr(self.hf_config, key)):
            raise ConfigError(
                f"Expected answers within the model's {room} positions. Got {max_new_tokens} tokens behind {len(start)} that every answer "
                f"begins with. Set generation.max_new_tokens to at most {room - len(start)}."
            )
        return Questions(self._sources(examples), start)

    def _sources(self, examples: Sequence[Example]) -> Sources:
        if self.kind == "audio":
            return AudioSources.encode(examples, self.hf_config)
        return TextSources.encode(examples, self.tokenizer, self.task, self.source_context)

    def _start(self) -> list[int]:
        return first_tokens(self.tokenizer, self.task, self.hf_config.decoder_start_token_id, self.context)


def tokenizer_of(model: str, cache: Path) -> str:
    """Folder of the tokenizer of a model: its own, or of a model on the hub one in the cache."""
    return model if Path(model).is_dir() else str(tokenizers.import_pretrained(PretrainedTokenizer(path=model), cache, of_model=True))


def new_tokenizer(config: AnyTokenizer, task: Task, examples: Sequence[Example], cache: Path) -> str:
    """Folder of the tokenizer of a model from scratch: a given one, or one trained on the texts of the examples."""
    if isinstance(config, PretrainedTokenizer):
        return str(tokenizers.import_pretrained(config, cache))
    texts = [text for example in examples for text in ((() if task.hears else (task.prompt(example),)) + example.references)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return str(tokenizers.train(config, iter(texts), digest, cache))


def from_scratch(model: ModelConfig, tokenizer: Any) -> ModelConfig:
    """The preset of an encoder-decoder, its special tokens those of a tokenizer where they are not overridden; any other model as it is.

    The decoder starts with Whisper's start of transcript, or with padding as T5's.
    """
    if model.preset is None or kind_of(preset_config(model.preset)) == "causal":
        return model
    pad, end = pad_id(tokenizer), tokenizer.eos_token_id
    start = tokenizer.get_vocab().get("<|startoftranscript|>", pad)
    tokens = {"pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": start}
    if kind_of(preset_config(model.preset)) == "audio":
        tokens |= {"bos_token_id": end}
    return model.model_copy(update={"overrides": tokens | model.overrides})
