"""Token files: flat uint16 or uint32 shards and an ``index.json`` that says what must be there."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysparse.config import ConfigError

SHARD_TOKENS = 1 << 28
INDEX = "index.json"


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split as one long sequence, memory-mapped.

    Attributes:
        first: [num_shards + 1], position of each shard's first token; the last entry is the number of tokens.
    """

    path: Path
    index: dict[str, Any]
    shards: tuple[NDArray[np.unsignedinteger], ...]
    first: NDArray[np.int64]

    @staticmethod
    def open(path: str | Path) -> "TokenFile":
        """Open by the path of the index; every shard must have the size that the index states."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(
                f"Expected prepared tokens at {path}. Got none on this machine. "
                "Put data.cache_dir on storage that all nodes share, or prepare the data again."
            )
        index = json.loads(path.read_text(encoding="utf-8"))
        dtype = np.dtype(index["dtype"])
        shards = []
        for entry in index["shards"]:
            shard = path.parent / entry["file"]
            size = shard.stat().st_size if shard.is_file() else 0
            if size != entry["num_tokens"] * dtype.itemsize:
                raise ConfigError(
                    f"Expected {entry['num_tokens'] * dtype.itemsize} bytes at {shard}. Got {size}. "
                    f"Delete the folder {path.parent.parent} and prepare the data again."
                )
            shards.append(np.memmap(shard, dtype, "r"))
        first = np.cumsum([0, *(len(shard) for shard in shards)], dtype=np.int64)
        return TokenFile(path, index, tuple(shards), first)

    def __len__(self) -> int:
        return int(self.first[-1])

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """[len(starts), length] token ids from each start on; a window may cross shards."""
        places = starts[:, None] + np.arange(length)
        if len(self.shards) == 1:
            return self.shards[0][places].astype(np.int64)
        owner = np.searchsorted(self.first, places, side="right") - 1
        ids = np.empty(places.shape, dtype=np.int64)
        for number in np.unique(owner):
            here = owner == number
            ids[here] = self.shards[number][places[here] - self.first[number]]
        return ids

    def verify(self) -> None:
        """Read everything and compare the SHA-256 of each shard with the index."""
        for entry in self.index["shards"]:
            shard = self.path.parent / entry["file"]
            with shard.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise ConfigError(
                    f"Expected SHA-256 {entry['sha256']} at {shard}. Got {digest}. "
                    f"Delete the folder {self.path.parent.parent} and prepare the data again."
                )


class ShardWriter:
    """Appends token ids to the shards of a new folder and counts them.

    Attributes:
        counts: [vocab_size], how often each token was written.
    """

    def __init__(self, folder: Path, dtype: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir()
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.entries: list[dict[str, Any]] = []

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    def write(self, ids: NDArray[np.unsignedinteger]) -> None:
        self.counts += np.bincount(ids, minlength=len(self.counts))
        for part in self._parts(ids):
            content = part.astype(self.dtype, copy=False).tobytes()
            with (self.folder / self.entries[-1]["file"]).open("ab") as file:
                file.write(content)
            self._digest.update(content)
            self.entries[-1]["num_tokens"] += len(part)
            self.entries[-1]["sha256"] = self._digest.hexdigest()

    def close(self, unigram_nats: float) -> Path:
        """Write the index; returns its path. `unigram_nats` is what a model that knows only token frequencies loses per token."""
        index = {
            "dtype": self.dtype,
            "vocab_size": len(self.counts),
            "num_tokens": self.num_tokens,
            "unigram_nats": unigram_nats,
            "shards": self.entries,
        }
        path = self.folder / INDEX
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        return path

    def _parts(self, ids: NDArray[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        while len(ids):
            if not self.entries or self.entries[-1]["num_tokens"] == self.shard_tokens:
                self.entries.append({"file": f"{len(self.entries):05}.bin", "num_tokens": 0, "sha256": ""})
                self._digest = hashlib.sha256()
            room = self.shard_tokens - self.entries[-1]["num_tokens"]
            yield ids[:room]
            ids = ids[room:]


def entropy(counts: NDArray[np.int64]) -> float:
    """H(p) = -sum p ln p of the token frequencies, in nats per token; `counts` [vocab_size]."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def cross_entropy(counts: NDArray[np.int64], train: NDArray[np.int64]) -> float:
    """-sum p ln q in nats per token: p the frequencies in `counts`, q those in `train` with one added to each, so none is 0."""
    log_q = np.log(train + 1) - math.log(train.sum() + len(train))
    return float(-(counts / counts.sum() * log_q).sum())
