"""Recordings: read and checked once, kept as samples that every worker maps, turned into log-mel spectrograms batch by batch."""

import hashlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.data.cache import publish
from raysparse.data.order import Ints

if TYPE_CHECKING:
    from transformers import PretrainedConfig, WhisperFeatureExtractor

    from raysparse.tasks.base import Example

RATE = 16_000
"""Samples per second that Whisper hears."""
_STREAMED = 0x7FFFF000
"""Lengths from here on stand in files whose writer did not know how long they would be."""

Samples = NDArray[np.float32]
Clip = tuple[str, bytes]
"""Where a recording stands, for errors, and the content of its file."""


def content(value: Any, where: str, column: str, folder: Path) -> bytes:
    """The file in a cell: ``{bytes, path}`` as `datasets.Audio` stores it, or a path, which is relative to `folder`."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str) or not path:
        raise ConfigError(
            f"Expected audio in column {column!r} at {where}: a path, or bytes and path. Got {value!r:.80}. "
            "Name another column in task.audio."
        )
    file = folder / Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"Expected the recording {file} that column {column!r} names at {where}. Got no such file. Correct the path.")
    return file.read_bytes()


def decode(clip: Clip, resample: bool) -> Samples:
    """[samples] at `RATE`, channels averaged.

    Raises:
        ConfigError: no sound file, one without samples or with silence alone, or one of another rate that is not to be resampled.
    """
    import soundfile

    where, data = clip
    _check_whole(clip)
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ConfigError(
            f"Expected a recording that libsndfile reads (WAV, FLAC, OGG, MP3) at {where}. Got: {error}. Mend it or remove the row."
        ) from None
    mono = samples.mean(1)
    if not len(mono) or not np.isfinite(mono).all() or mono.min() == mono.max():
        got = "no samples" if not len(mono) else "silence" if np.isfinite(mono).all() else "samples that are not finite"
        got = "channels that cancel out" if got == "silence" and np.ptp(samples) else got
        raise ConfigError(f"Expected sound at {where}. Got {got} ({len(mono)} samples at {rate} Hz). Remove the row.")
    if rate == RATE:
        return mono
    if not resample:
        raise ConfigError(f"Expected a sampling rate of {RATE} Hz at {where}. Got {rate} Hz. Resample it, or set task.resample=true.")
    import soxr

    return soxr.resample(mono, rate, RATE).astype(np.float32)


def _check_whole(clip: Clip) -> None:
    """A `ConfigError` for a WAV file that ends before its header says; libsndfile reads what is there, and the text would be of more."""
    where, data = clip
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if kind == b"data" and 0 < size < _STREAMED and at + size > len(data):
            raise ConfigError(f"Expected {size} bytes of sound at {where}. Got {len(data) - at}: the file is cut off. Copy it again.")
        at += size + size % 2


def check_packages(resample: bool) -> None:
    """A `ConfigError` where the packages that read audio are missing."""
    try:
        import soundfile  # noqa: F401

        if resample:
            import soxr  # noqa: F401
    except (ImportError, OSError) as error:
        raise ConfigError(f"Expected the packages soundfile and soxr to read audio. Got: {error}. pip install 'raysparse[audio]'") from None


def store(clips: Iterator[Clip], again: Iterator[Clip], resample: bool, cache: Path) -> Path:
    """Read recordings, one at a time, into a folder that `load` maps; done before, it is found by their content.

    Args:
        again: the same clips once more: they are hashed first, and read where the hash is new.
    """
    digest = hashlib.sha256(f"{RATE} {resample}".encode())
    for _, data in clips:
        digest.update(hashlib.sha256(data).digest())
    return publish(cache / "audio" / digest.hexdigest()[:24], lambda folder: _write(again, resample, folder))


def load(folder: Path) -> list[Samples]:
    """The samples of each recording, in order, mapped and not read."""
    if not (folder / "first.npy").exists():
        raise ConfigError(f"Expected prepared audio at {folder}. Got none on this machine. Put the cache on storage that all nodes share.")
    first = np.load(folder / "first.npy")
    samples = np.memmap(folder / "samples.f32", dtype=np.float32, mode="r", shape=(int(first[-1]),))
    return [samples[start:end] for start, end in pairwise(first)]


def _write(clips: Iterator[Clip], resample: bool, folder: Path) -> None:
    sizes = [0]
    with (folder / "samples.f32").open("wb") as file:
        for clip in clips:
            samples = decode(clip, resample)
            samples.tofile(file)
            sizes.append(len(samples))
    np.save(folder / "first.npy", np.cumsum(sizes, dtype=np.int64))


def extractor(hf_config: "PretrainedConfig") -> "WhisperFeatureExtractor":
    """What turns samples into what a Whisper hears, by transformers: 10 ms a frame, two frames a position of its encoder."""
    from transformers import WhisperFeatureExtractor

    hop = WhisperFeatureExtractor().hop_length
    seconds, rest = divmod(2 * hf_config.max_source_positions * hop, RATE)
    if rest:
        raise ConfigError(
            f"Expected max_source_positions that make whole seconds, 50 each. Got {hf_config.max_source_positions}. Change model.overrides."
        )
    return WhisperFeatureExtractor(feature_size=hf_config.num_mel_bins, chunk_length=seconds)


@dataclass(frozen=True)
class AudioSources:
    """Recordings, see `seq2seq.Sources`: shorter ones are padded with silence, which a Whisper hears like everything else; a longer one is
    an error, for nobody knows which words to cut with it."""

    clips: Sequence[Samples]
    extractor: "WhisperFeatureExtractor"
    truncated: NDArray[np.bool_] = field(repr=False)

    @staticmethod
    def encode(examples: "Sequence[Example]", hf_config: "PretrainedConfig") -> "AudioSources":
        maker = extractor(hf_config)
        clips = []
        for example in examples:
            assert example.audio is not None, "examples are loaded by `recipes.evaluate.load_examples`"
            if len(example.audio) > maker.n_samples:
                raise ConfigError(
                    f"Expected recordings of at most {maker.n_samples / RATE:g} s, which the model hears at once. "
                    f"Got {len(example.audio) / RATE:.2f} s at {example.source}. Split it and its text, or remove the row."
                )
            clips.append(example.audio)
        return AudioSources(clips, maker, np.zeros(len(clips), dtype=bool))

    @property
    def sizes(self) -> Ints:
        return np.zeros(len(self.clips), dtype=np.int64)

    def read(self, index: Ints, whole: Ints) -> tuple[Tensor, None]:
        """[recordings, bins, frames]. Each by itself, so that no spectrogram depends on what it shares a batch with."""
        return torch.stack([self._spectrogram(self.clips[number]) for number in index]), None

    def _spectrogram(self, samples: Samples) -> Tensor:
        found = self.extractor(np.asarray(samples), sampling_rate=RATE, return_tensors="pt")
        return found["input_features"][0]
