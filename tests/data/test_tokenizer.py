from pathlib import Path

import pytest

from raysparse.config import ConfigError
from raysparse.data import tokenizer
from raysparse.data.encode import Encoder
from raysparse.data.tokenizer import END_OF_TEXT, PretrainedTokenizer, TrainTokenizer, import_pretrained, load, sample, train

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    return train(TrainTokenizer(vocab_size=300), iter(texts), "corpus", tmp_path_factory.mktemp("cache"))


def test_a_trained_tokenizer_loads_and_encodes_any_text(folder):
    loaded = load(folder)
    assert len(loaded) == 300
    assert loaded.eos_token == loaded.pad_token == END_OF_TEXT
    for text in ("sparse weights", "Ünïcode \U0001f600\n\ttabs  spaces ", "don't"):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded("sparse weight dense")["input_ids"]) <= 10


def test_training_is_repeatable_and_cached(folder, texts, tmp_path, monkeypatch):
    config = TrainTokenizer(vocab_size=300)
    again = train(config, iter(texts), "corpus", tmp_path)
    assert again.name == folder.name
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(folder)
    monkeypatch.setattr(tokenizer, "_train", lambda *args: pytest.fail("trained again"))
    assert train(config, iter(()), "corpus", tmp_path) == again
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        train(config, iter(texts), "another corpus", tmp_path)


def test_the_end_of_text_written_in_a_document_is_text(folder):
    eos = load(folder).eos_token_id
    train_ids, held_out = Encoder(folder, eos, "uint16").encode([(False, f"a{END_OF_TEXT}b"), (False, "c"), (True, "d")])
    assert (train_ids == eos).sum() == 2
    assert load(folder).decode(train_ids) == f"a{END_OF_TEXT}b{END_OF_TEXT}c{END_OF_TEXT}"
    assert held_out.tolist()[-1] == eos


def test_the_sample_fits_and_is_spread(texts):
    kept = sample(iter(texts), 2000)
    assert 1000 < sum(len(text.encode()) for text in kept) <= 2000
    assert kept != texts[: len(kept)]
    assert kept == sample(iter(texts), 2000)
    assert sample(iter(["long" * 100]), 10) == ["long" * 100]


def test_the_sample_of_an_endless_stream_ends():
    def endless():
        for k in range(10**9):
            assert k < 1000, "read on and on"
            yield f"{k:0100}"

    assert len(sample(endless(), 1000)) == 10


def test_no_documents_no_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected training documents to train a tokenizer on. Got none"):
        train(TrainTokenizer(), iter(()), "empty", tmp_path)
    assert list((tmp_path / "tokenizers").iterdir()) == []


def test_a_trained_tokenizer_can_be_given_as_an_existing_one(folder, tmp_path):
    copy = import_pretrained(PretrainedTokenizer(path=str(folder)), tmp_path)
    assert copy.parent == tmp_path / "tokenizers"
    assert load(copy)("sparse é")["input_ids"] == load(folder)("sparse é")["input_ids"]
    assert import_pretrained(PretrainedTokenizer(path=str(folder)), tmp_path) == copy
    assert [path for path in tmp_path.iterdir() if path.name != "tokenizers"] == []


def test_gpt2(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("the GPT-2 tokenizer files are not on this machine")
    folder = import_pretrained(PretrainedTokenizer(path=str(SHARED / "gpt2")), tmp_path)
    loaded = load(folder)
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (50257, 50256, 50256)
    assert Encoder(folder, 50256, "uint16").encode([(False, "Hello world")])[0].tolist() == [15496, 995, 50256]


def test_tokenizers_that_cannot_serve_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Expected a tokenizer at '.*/nothing'\. Got: (.|\n)*tokenizer\.json, or a name"):
        import_pretrained(PretrainedTokenizer(path=str(tmp_path / "nothing")), tmp_path)

    def change(**fields):
        loaded = load(folder)
        for name, value in fields.items():
            monkeypatch.setattr(type(loaded), name, value, raising=False)
        monkeypatch.setattr(tokenizer, "load", lambda path: loaded)

    change(eos_token_id=None)
    with pytest.raises(ConfigError, match=r"Expected a tokenizer with an end-of-text token at 'x'. Got none"):
        import_pretrained(PretrainedTokenizer(path="x"), tmp_path)
    change(is_fast=False)
    with pytest.raises(ConfigError, match=r"with a tokenizer\.json at 'x'\. Got \w+, which runs in Python"):
        import_pretrained(PretrainedTokenizer(path="x"), tmp_path)
