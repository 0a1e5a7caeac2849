"""The tokenizer of a run: trained on its documents, or a given one; either way a folder that `AutoTokenizer` loads."""

import hashlib
import heapq
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field

from raysparse.config import Config, ConfigError
from raysparse.data.cache import publish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


class TrainTokenizer(Config):
    """A byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) trained on the training documents; encodes any text."""

    type: Literal["train"] = "train"
    vocab_size: int = Field(4096, ge=257)
    """Number of tokens: 256 bytes, the end of text, and the merges. A small corpus may yield fewer."""
    sample_bytes: int = Field(16_000_000, gt=0)
    """Train on at most this much text, a fixed pseudo-random choice among the first eight times as much."""


class PretrainedTokenizer(Config):
    """An existing tokenizer."""

    type: Literal["pretrained"] = "pretrained"
    path: str
    """Folder, or a name on the hub."""


AnyTokenizer = Annotated[TrainTokenizer | PretrainedTokenizer, Field(discriminator="type")]


def train(config: TrainTokenizer, documents: Iterator[str], corpus: str, cache: Path) -> Path:
    """Train on `documents`, whose fingerprint is `corpus`; trained once per cache. Returns the folder."""
    import tokenizers

    key = hashlib.sha256(json.dumps([config.digest(), corpus, tokenizers.__version__]).encode()).hexdigest()[:24]
    return publish(cache / "tokenizers" / key, lambda folder: _train(config, documents, folder))


def import_pretrained(config: PretrainedTokenizer, cache: Path, of_model: bool = False) -> Path:
    """Copy the tokenizer into the cache, under a hash of its content: every process reads the same. Returns the folder.

    Args:
        of_model: `path` is a model's, whose generation config comes along if it has one: an export needs it (Whisper's languages).
    """
    from transformers import GenerationConfig

    path = Path(config.path).expanduser()
    try:
        tokenizer = load(str(path) if path.is_dir() else config.path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a tokenizer at {config.path!r}. Got: {error}. Give a folder with tokenizer.json, or a name on the hub."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"Expected a tokenizer with a tokenizer.json at {config.path!r}. Got {type(tokenizer).__name__}, which runs "
            "in Python. Convert it, or train one: data.tokenizer.type=train."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"Expected a tokenizer with an end-of-text token at {config.path!r}. Got none. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        tokenizer.save_pretrained(folder)
        if of_model:
            with suppress(OSError):  # there is none
                GenerationConfig.from_pretrained(config.path).save_pretrained(folder)
        key = fingerprint(Path(folder))[:24]
        return publish(cache / "tokenizers" / key, lambda target: shutil.copytree(folder, target, dirs_exist_ok=True))


def load(path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder, or of that name on the hub; OSError or ValueError where there is none."""
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(path, trust_remote_code=False))


def fingerprint(folder: Path) -> str:
    """SHA-256 of the vocabulary, the merges and the settings of a tokenizer folder."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return hashlib.sha256(b"\0".join((folder / name).read_bytes() for name in names)).hexdigest()


def sample(documents: Iterator[str], max_bytes: int) -> list[str]:
    """The documents with the smallest hashes that fit in `max_bytes`: spread over the corpus, in bounded memory."""
    kept: list[tuple[int, str]] = []  # a heap, the largest hash first
    size = read = 0
    for text in documents:
        content = text.encode()
        heapq.heappush(kept, (-int.from_bytes(hashlib.sha256(content).digest()[:8], "big"), text))
        size += len(content)
        read += len(content)
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[1].encode())
        if read > 8 * max_bytes:
            break
    return [text for _, text in sorted(kept, reverse=True)]


def _train(config: TrainTokenizer, documents: Iterator[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = sample(documents, config.sample_bytes)
    if not texts:
        raise ConfigError("Expected training documents to train a tokenizer on. Got none. Check data.train.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
