"""Pre-training data: each document is tokenized once into a cache; a batch is then a few reads of a memory-mapped file."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from raysparse.config import Config, ConfigError
from raysparse.data import tokenizer as tokenizers
from raysparse.data.batch import Batch
from raysparse.data.cache import publish
from raysparse.data.encode import Chunk, encode_chunks
from raysparse.data.order import Ints, shuffled, spread
from raysparse.data.shards import INDEX, ShardWriter, TokenFile, cross_entropy, entropy
from raysparse.data.sources import AnySource, Files, Hub, PythonStdlib
from raysparse.data.tokenizer import AnyTokenizer, TrainTokenizer

_FORMAT = 1  # in every cache key: raise it when the same config would give other tokens
_CHUNK_CHARS = 1 << 20


class Holdout(Config):
    """Validate on some of the training documents, chosen by a hash of their content and left out of training."""

    type: Literal["holdout"] = "holdout"
    fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents; equal documents always fall on the same side."""

    def takes(self, text: str) -> bool:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < self.fraction * 2**64


AnyValidation = Annotated[Holdout | PythonStdlib | Files | Hub, Field(discriminator="type")]


class DataConfig(Config):
    """What a model is pre-trained on, and how it becomes tokens."""

    train: AnySource = PythonStdlib()
    """Training documents."""
    validation: AnyValidation = Holdout()
    """Validation documents: held out of the training documents, or another source."""
    tokenizer: AnyTokenizer = TrainTokenizer()
    """Trained on the training documents, or an existing one."""
    context: int = Field(256, ge=1)
    """Tokens per sequence."""
    max_tokens: int | None = Field(None, gt=0)
    """Stop after this many training tokens, and as many of a separate validation source; null reads all."""
    cache_dir: str = "~/.cache/raysparse"
    """Where tokenizers and tokens are kept; with several nodes, on storage they all share."""
    num_proc: int = Field(8, ge=1)
    """Processes that tokenize; no more than the machine has cores are started."""


@dataclass(frozen=True)
class Prepared:
    """Where the tokens are and what is known about them. ``Prepared(**asdict(p)) == p``, so it travels as JSON.

    Attributes:
        train, validation: paths of the index files, see `TokenFile.open`.
        tokenizer: folder for `AutoTokenizer.from_pretrained`.
        vocab_size: number of tokens of the tokenizer.
        train_unigram_nats: entropy of the training token frequencies, nats per token.
        validation_unigram_nats: cross-entropy of the validation tokens under the training frequencies, nats per token: the
            validation loss of a model that ignores its context. A trained model must be below it.
    """

    train: str
    validation: str
    tokenizer: str
    vocab_size: int
    eos_id: int
    num_train_documents: int
    num_validation_documents: int
    num_train_tokens: int
    num_validation_tokens: int
    train_unigram_nats: float
    validation_unigram_nats: float


def prepare(config: DataConfig, progress: bool = True) -> Prepared:
    """Tokenize the data, or find it in the cache. Safe to call from several processes at once and to kill at any moment.

    Raises:
        ConfigError: missing or malformed files, no documents, or fewer tokens than one sequence needs.
    """
    cache = Path(config.cache_dir).expanduser().absolute()
    corpus = [config.train.fingerprint(), config.validation.model_dump(mode="json")]
    if not isinstance(config.validation, Holdout):
        corpus[1] = config.validation.fingerprint()
    if isinstance(config.tokenizer, TrainTokenizer):
        texts = (text for held_out, text in _training_documents(config) if not held_out)
        folder = tokenizers.train(config.tokenizer, texts, json.dumps(corpus), cache)
    else:
        folder = tokenizers.import_pretrained(config.tokenizer, cache)
    key = json.dumps([_FORMAT, corpus, tokenizers.fingerprint(folder), config.max_tokens])
    target = cache / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:24]
    publish(target, lambda temporary: _tokenize(config, folder, temporary, progress))
    values = json.loads((target / "prepared.json").read_text(encoding="utf-8"))
    prepared = replace(
        Prepared(**values),
        train=str(target / "train" / INDEX),
        validation=str(target / "validation" / INDEX),
        tokenizer=str(folder),
    )
    _check_lengths(prepared, config.context)
    return prepared


class TokenFeed:
    """Training sequences: windows of ``context + 1`` tokens, all of them once an epoch, in an order keyed by (seed, epoch)."""

    def __init__(self, tokens: TokenFile, context: int, sequences: int, seed: int) -> None:
        self.tokens, self.context, self.sequences, self.seed = tokens, context, sequences, seed
        self.num_windows = num_windows(tokens, context)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every window was seen, rounded up."""
        return -(-self.num_windows // self.sequences)

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """[len(rows), context]; see `Feed`."""
        return _windows(self.tokens, self.context, shuffled(step, rows, self.sequences, self.num_windows, self.seed))


class TokenValidation:
    """`sequences` windows, evenly spread over the file: the same ones every time, whatever the step."""

    def __init__(self, tokens: TokenFile, context: int, sequences: int) -> None:
        self.tokens, self.context, self.sequences = tokens, context, sequences
        self.num_windows = num_windows(tokens, context)

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """[len(rows), context]; see `Feed`."""
        return _windows(self.tokens, self.context, spread(rows, self.sequences, self.num_windows))


def num_windows(tokens: TokenFile, context: int) -> int:
    """Windows in a file; the label of a window's last token is the first token of the next, so one token more is needed."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ConfigError(
            f"Expected at least {context + 1} tokens in {tokens.path} for one sequence. Got {len(tokens)}. "
            "Give more data or lower data.context."
        )
    return count


def _windows(tokens: TokenFile, context: int, index: Ints) -> Batch:
    ids = torch.from_numpy(tokens.windows(index * context, context + 1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def _training_documents(config: DataConfig) -> Iterator[tuple[bool, str]]:
    """(held out for validation?, text) of the training source."""
    for text in config.train.documents():
        yield isinstance(config.validation, Holdout) and config.validation.takes(text), text


def _tokenize(config: DataConfig, tokenizer: Path, folder: Path, progress: bool) -> None:
    """Write both splits and ``prepared.json`` into an empty folder."""
    loaded = tokenizers.load(tokenizer)
    vocab_size, eos_id = len(loaded), loaded.eos_token_id
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    train, validation = (ShardWriter(folder / name, dtype, vocab_size) for name in ("train", "validation"))
    num_train, num_held_out = _write(config, _training_documents(config), (train, validation), tokenizer, eos_id, progress)
    if not isinstance(config.validation, Holdout):
        documents = ((True, text) for text in config.validation.documents())
        _, num_held_out = _write(config, documents, (train, validation), tokenizer, eos_id, progress)
    for writer, split in ((train, "train"), (validation, "validation")):
        if not writer.num_tokens:
            raise ConfigError(
                f"Expected {split} documents. Got none that hold text, from {num_train + num_held_out} in all. "
                f"Check data.{split}" + ("; a larger holdout fraction takes more documents." if split == "validation" else ".")
            )
    nats = entropy(train.counts), cross_entropy(validation.counts, train.counts)
    train.close(nats[0])
    validation.close(nats[1])
    counts = num_train, num_held_out, train.num_tokens, validation.num_tokens
    prepared = Prepared("", "", "", vocab_size, eos_id, *counts, *nats)
    (folder / "prepared.json").write_text(json.dumps(asdict(prepared), indent=1) + "\n", encoding="utf-8")


def _write(
    config: DataConfig,
    documents: Iterator[tuple[bool, str]],
    writers: tuple[ShardWriter, ShardWriter],
    tokenizer: Path,
    eos_id: int,
    progress: bool,
) -> tuple[int, int]:
    """Tokenize until the documents or ``max_tokens`` end; returns the number of (training, validation) documents."""
    from tqdm import tqdm

    num_documents = [0, 0]
    num_proc = min(config.num_proc, os.cpu_count() or 1)
    room = config.max_tokens
    # disable=None shows the bar on a terminal only
    with tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, total=room, disable=None if progress else True) as bar:
        for chunk, encoded in encode_chunks(_chunks(documents), tokenizer, eos_id, writers[0].dtype, num_proc):
            for held_out, _ in chunk:
                num_documents[held_out] += 1
            full = False
            for writer, ids in zip(writers, encoded, strict=True):
                kept = ids if room is None else ids[: room - writer.num_tokens]
                writer.write(kept)
                bar.update(len(kept))
                full |= len(kept) < len(ids)
            if full:
                break
    return num_documents[0], num_documents[1]


def _chunks(documents: Iterator[tuple[bool, str]]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for held_out, text in documents:
        chunk.append((held_out, text))
        size += len(text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_lengths(prepared: Prepared, context: int) -> None:
    for path in (prepared.train, prepared.validation):
        num_windows(TokenFile.open(path), context)
