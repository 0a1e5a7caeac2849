"""Answers of a model to prompts, or to what its encoder reads, in batches of similar length."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError
from raysparse.data.batch import source_inputs
from raysparse.models.hub_config import position_key
from raysparse.sparsity import counter

if TYPE_CHECKING:
    from transformers import GenerationConfig as Settings
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from raysparse.data.seq2seq import Sources


class GenerationConfig(Config):
    """How an answer is searched for: greedy with one beam, else beam search, or drawn where temperature is above 0."""

    max_new_tokens: int = Field(64, ge=1)
    """Longest answer in tokens."""
    num_beams: int = Field(1, ge=1)
    """Answers kept while searching; 1 is greedy, SPDF's tasks use 10."""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power: above 1 favours long answers. SPDF's tasks use 0.8 to 0.9."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No sequence of this many tokens occurs twice; 0 allows all. SPDF's tasks use 4."""
    temperature: float = Field(0, ge=0)
    """0 searches for the likeliest answer; 1 draws tokens as likely as the model says, lower values keep to likely ones."""
    top_p: float = Field(1, gt=0, le=1)
    """Draw from the likeliest tokens that have this probability together."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the drawing."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""

    @model_validator(mode="after")
    def _drawn_or_searched(self) -> Self:
        if self.temperature and self.num_beams > 1:
            raise ValueError(f"Expected num_beams 1 with a temperature. Got {self.num_beams}. Drop one of the two")
        return self


class Prompts(Protocol):
    """What is to be answered.

    Attributes:
        before: most tokens that stand before an answer.
    """

    @property
    def before(self) -> int: ...

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each."""
        ...

    def inputs(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Arguments of transformers' ``generate``; all answers of a batch start at the same place."""
        ...


@dataclass(frozen=True)
class Beginnings:
    """Tokens that a causal model goes on from, as `data.pairs.encode_prompts` makes them; padded on the left, the padding masked."""

    ids: Sequence[Sequence[int]]
    pad_id: int

    @property
    def before(self) -> int:
        return max(self.sizes, default=0)

    @property
    def sizes(self) -> Sequence[int]:
        return [len(prompt) for prompt in self.ids]

    def inputs(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        ids, mask = left_pad([self.ids[row] for row in rows], self.pad_id)
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Questions:
    """Sources for an encoder, and what the decoder begins every answer with (`data.seq2seq.first_tokens`)."""

    sources: "Sources"
    start: Sequence[int]

    @property
    def before(self) -> int:
        return len(self.start)

    @property
    def sizes(self) -> Sequence[int]:
        return self.sources.sizes.tolist()

    def inputs(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        index = np.asarray(rows, dtype=np.int64)
        start = torch.tensor(self.start).expand(len(rows), -1)
        return source_inputs(*self.sources.read(index, index)) | {"decoder_input_ids": start}


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Prompts,
    config: GenerationConfig,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> dict[int, str]:
    """Number of a prompt -> its answer, without special tokens and without spaces at the ends, of this rank's share of the prompts.

    What is batched together depends on the prompts alone, so that answers are the same on any number of ranks: of the batches, longest
    prompts first, every rank takes its turn.

    Args:
        prompts: of all ranks.
    """
    from tqdm import tqdm
    from transformers import GenerationConfig as Settings
    from transformers import GenerationMixin

    _check_room(model, prompts.before + config.max_new_tokens)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    drawn = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    settings = Settings(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty if config.num_beams > 1 else None,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **({"do_sample": False} | drawn),
    )
    was_training = model.training
    model.eval()
    sizes = prompts.sizes
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])  # the longest first: too little memory shows at once
    batches = [order[first : first + config.batch_size] for first in range(0, len(order), config.batch_size)]
    answers: dict[int, str] = {}
    mine = range(rank, len(batches), ranks)
    with tqdm(desc="generating", total=sum(len(batches[k]) for k in mine), disable=None if progress else True) as bar:
        for number in mine:
            rows = batches[number]
            inputs = {name: value.to(model.device) for name, value in prompts.inputs(rows).items()}
            first = inputs.get("decoder_input_ids", inputs.get("input_ids"))
            assert first is not None
            with torch.random.fork_rng(enabled=config.temperature > 0):
                if config.temperature:
                    torch.manual_seed(counter.key(config.seed, "generate", number))
                # Whisper's own generate, for recordings of any length, chooses language, task and temperatures itself
                output = cast(Any, GenerationMixin).generate(model, **inputs, generation_config=settings)
            texts = tokenizer.batch_decode(output[:, first.shape[1] :], skip_special_tokens=True)
            answers |= {row: text.strip() for row, text in zip(rows, texts, strict=True)}
            bar.update(len(rows))
    model.train(was_training)
    return answers


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        ids: the new tokens.
        prefill_s: until the first of them.
        decode_s: for all others together.
    """

    ids: list[int]
    prefill_s: float
    decode_s: float


@torch.no_grad()
def complete(model: "PreTrainedModel", prompt: Sequence[int], settings: "Settings") -> Completion:
    """Go on from one prompt of token ids, and time it."""
    _check_room(model, len(prompt) + cast(int, settings.max_new_tokens))
    clock = _Clock()
    ids = torch.tensor([list(prompt)])
    began = time.perf_counter()
    output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    first, last = clock.times[1], clock.times[-1]  # generate shows the prompt before it begins
    return Completion(output[0, len(prompt) :].tolist(), first - began, last - first)


class _Clock:
    """Notes when ``generate`` has a token, in the place of what would print it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _check_room(model: "PreTrainedModel", longest: int) -> None:
    key = position_key(model.config)
    room = longest if key is None else getattr(model.config, key)
    if longest > room:
        raise ConfigError(
            f"Expected prompts and answers within the model's {room} positions. Got {longest}. Lower max_new_tokens or cut the prompts."
        )


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([rows, longest] int64 ids, [rows, longest] int64 mask, 1 = token)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
