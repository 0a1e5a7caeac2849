"""Texts to token ids in parallel processes. Imports little: every process that is started pays for it."""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Chunk = list[tuple[bool, str]]
"""Documents in order, each with whether it is held out for validation."""
Encoded = tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]
"""Token ids of a chunk's training documents and of its validation documents, every document followed by end-of-text."""


class Encoder:
    """A tokenizer file, and how a chunk becomes ids."""

    def __init__(self, folder: Path, eos_id: int, dtype: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not the end of it
        self.eos_id = eos_id
        self.dtype = np.dtype(dtype)

    def encode(self, chunk: Chunk) -> Encoded:
        encodings = self.tokenizer.encode_batch_fast([text for _, text in chunk], add_special_tokens=False)
        ids: tuple[list[int], list[int]] = ([], [])
        for (held_out, _), encoding in zip(chunk, encodings, strict=True):
            ids[held_out].extend(encoding.ids)
            ids[held_out].append(self.eos_id)
        return np.array(ids[0], dtype=self.dtype), np.array(ids[1], dtype=self.dtype)


def encode_chunks(chunks: Iterable[Chunk], folder: Path, eos_id: int, dtype: str, num_proc: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its ids, in order, whatever the number of processes; a corpus of one chunk is encoded in this process."""
    chunks = iter(chunks)
    head = list(itertools.islice(chunks, 2))
    if num_proc == 1 or len(head) < 2:
        encoder = Encoder(folder, eos_id, dtype)
        for chunk in itertools.chain(head, chunks):
            yield chunk, encoder.encode(chunk)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, _start, (folder, eos_id, dtype)) as pool:
        waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in itertools.chain(head, chunks):
                waiting.append((chunk, pool.submit(_encode, chunk)))
                if len(waiting) > 2 * num_proc:  # bounds memory: a stream may have no end
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None


def _start(folder: Path, eos_id: int, dtype: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(folder, eos_id, dtype)


def _encode(chunk: Chunk) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(chunk)
