"""Recordings: what is read, what is refused, and what a Whisper hears of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raysparse.config import ConfigError
from raysparse.data.audio import AudioSources, content, decode, load, store
from raysparse.tasks.base import Example
from tests.sounds import RATE, tone, wav

pytest.importorskip("soundfile", reason="soundfile is not installed: pip install 'raysparse[audio]'")


def config(**more):
    from transformers import WhisperConfig

    return WhisperConfig(**{"num_mel_bins": 16, "max_source_positions": 50} | more)


def test_a_file_is_read_as_it_is():
    samples = tone()
    found = decode(("here", wav(samples)), resample=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=1e-4)


def test_channels_are_averaged():
    left, right = tone(), tone(hertz=880)
    found = decode(("here", wav(np.stack([left, right], 1).ravel(), channels=2)), resample=False)
    np.testing.assert_allclose(found, (left + right) / 2, atol=1e-4)


def test_another_rate_is_refused_or_resampled():
    pytest.importorskip("soxr")
    file = wav(tone(rate=8000), 8000)
    with pytest.raises(ConfigError, match=r"a sampling rate of 16000 Hz at row 3\. Got 8000 Hz\. Resample it, or set task\.resample=true"):
        decode(("row 3", file), resample=False)
    found = decode(("row 3", file), resample=True)
    assert len(found) == RATE // 2
    middle = slice(RATE // 8, 3 * RATE // 8)  # the ends have nothing beyond them to be made of
    np.testing.assert_allclose(found[middle], tone()[middle], atol=5e-3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"no sound", r"a recording that libsndfile reads \(WAV, FLAC, OGG, MP3\) at row 3\. Got: .*Mend it or remove the row"),
        (b"", r"a recording that libsndfile reads"),
        (wav([]), r"Expected sound at row 3\. Got no samples \(0 samples at 16000 Hz\)"),
        (wav(np.zeros(100)), r"Expected sound at row 3\. Got silence \(100 samples at 16000 Hz\)"),
        (wav(np.array([1.0, -1.0] * 50), channels=2), r"Expected sound at row 3\. Got channels that cancel out \(50 samples"),
        (wav(tone())[:1000], r"Expected 16000 bytes of sound at row 3\. Got 956: the file is cut off\. Copy it again"),
    ],
    ids=["text", "nothing", "empty", "silence", "antiphase", "cut"],
)
def test_what_is_no_sound_is_refused(data, text):
    with pytest.raises(ConfigError, match=text):
        decode(("row 3", data), resample=False)


def test_a_cell_is_bytes_or_a_path_beside_the_table(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"A")
    assert content({"bytes": b"B", "path": "a.wav"}, "row 3", "audio", tmp_path) == b"B"
    assert content({"bytes": None, "path": "a.wav"}, "row 3", "audio", tmp_path) == b"A"
    assert content("a.wav", "row 3", "audio", tmp_path) == content(str(tmp_path / "a.wav"), "row 3", "audio", Path("/")) == b"A"
    with pytest.raises(ConfigError, match=r"the recording .*/b\.wav that column 'audio' names at row 3\. Got no such file"):
        content("b.wav", "row 3", "audio", tmp_path)
    for cell in (None, 3, {"bytes": None, "path": None}):
        with pytest.raises(ConfigError, match=r"audio in column 'audio' at row 3: a path, or bytes and path\. Got"):
            content(cell, "row 3", "audio", tmp_path)


def test_what_is_stored_is_found_again_and_not_read_twice(tmp_path):
    clips = [(f"row {k}", wav(tone(0.1 * (k + 1)))) for k in range(3)]
    folder = store(iter(clips), iter(clips), False, tmp_path)
    found = load(folder)
    assert [len(samples) for samples in found] == [1600, 3200, 4800]
    for clip, samples in zip(clips, found, strict=True):
        assert np.array_equal(samples, decode(clip, False))
    assert store(iter(clips), iter([("row 0", b"no sound")]), False, tmp_path) == folder
    assert store(iter(clips[:2]), iter(clips[:2]), False, tmp_path) != folder
    with pytest.raises(ConfigError, match=r"prepared audio at .*nowhere\. Got none on this machine"):
        load(tmp_path / "nowhere")


def heard(examples, hf_config=None):
    return AudioSources.encode(examples, hf_config or config())


def examples(*seconds):
    return [Example(f"row {k}", ("said",), audio=tone(s, 300 + 100 * k).astype(np.float32)) for k, s in enumerate(seconds)]


def test_a_spectrogram_does_not_depend_on_its_batch_and_is_the_models_own():
    from transformers import WhisperFeatureExtractor

    some = examples(0.3, 1.0, 0.7)
    sources = heard(some)
    everything, mask = sources.read(np.arange(3), np.arange(3))
    assert mask is None
    assert everything.shape == (3, 16, 100)  # 1 s: 2 frames for each of 50 positions
    for k in range(3):
        alone, _ = sources.read(np.array([k]), np.arange(3))
        assert torch.equal(alone[0], everything[k])
    theirs = WhisperFeatureExtractor(feature_size=16, chunk_length=1)(some[0].audio, sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(theirs["input_features"][0], everything[0])
    assert everything.std() > 0.1


def test_real_whispers_hear_30_seconds():
    maker = heard(examples(0.5), config(max_source_positions=1500, num_mel_bins=80)).extractor
    assert (maker.n_samples, maker.nb_max_frames, maker.feature_size) == (30 * RATE, 3000, 80)


def test_what_the_model_cannot_hear_at_once_is_refused():
    with pytest.raises(ConfigError, match=r"recordings of at most 1 s, .* Got 1\.20 s at row 1\. Split it and its text"):
        heard(examples(0.5, 1.2))
    with pytest.raises(ConfigError, match=r"max_source_positions that make whole seconds, 50 each\. Got 60"):
        heard(examples(0.5), config(max_source_positions=60))
