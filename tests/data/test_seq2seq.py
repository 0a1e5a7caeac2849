"""What an encoder and a decoder read of pairs of texts."""

import numpy as np
import pytest
import torch

from raysparse.config import ConfigError
from raysparse.data.batch import IGNORED
from raysparse.data.pairs import PairFeed
from raysparse.data.seq2seq import Seq2seqRows, TextSources, first_tokens
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.tasks import Example, Speech, Translation
from raysparse.tasks.tables import PairFiles

NOWHERE = PairFiles(train="", validation="", test="")
TASK = Translation(data=NOWHERE, source="en", target="de", prefix="say: ")
START = [7]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return load(train(TrainTokenizer(vocab_size=300), iter(texts), "corpus", tmp_path_factory.mktemp("cache")))


def rows_of(tokenizer, examples, context=32, source_context=32):
    return Seq2seqRows.encode(examples, TextSources.encode(examples, tokenizer, TASK, source_context), tokenizer, TASK, START, context)


def batch_of(rows, *index):
    return rows.batch(np.array(index), np.array(index))


def test_the_encoder_reads_the_prompt_and_the_decoder_predicts_the_answer(tokenizer):
    rows = rows_of(tokenizer, [Example("mask", ("live dead",)), Example("mask " * 5, ("live",))])
    batch = batch_of(rows, 0, 1)
    assert batch.source is not None
    assert batch.source_mask is not None
    for row, (said, answer) in enumerate([("say: mask", "live dead"), ("say: " + "mask " * 5, "live")]):
        heard = batch.source[row][batch.source_mask[row]].tolist()
        assert tokenizer.decode(heard[:-1]) == said
        predicted = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        assert tokenizer.decode(predicted[:-1]) == answer
        assert heard[-1] == predicted[-1] == tokenizer.eos_token_id
        assert batch.input_ids[row, : len(predicted)].tolist() == [*START, *predicted[:-1]]
    assert batch.source.shape[1] % 8 == batch.input_ids.shape[1] % 8 == 0
    assert set(batch.inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_every_reference_is_a_row_and_its_source_is_kept_once(tokenizer):
    rows = rows_of(tokenizer, [Example("mask", ("live", "dead")), Example("row", ("grow",))])
    assert rows.of.tolist() == [0, 0, 1]
    assert len(rows.sources.sizes) == 2
    batch = batch_of(rows, 0, 1)
    assert torch.equal(batch.source[0], batch.source[1])
    assert not torch.equal(batch.labels[0], batch.labels[1])


def test_what_is_too_long_is_cut_and_counted(tokenizer):
    rows = rows_of(tokenizer, [Example("mask " * 50, ("live",)), Example("mask", ("live " * 50,))], context=16, source_context=24)
    assert (rows.num_truncated, rows.num_truncated_targets) == (1, 1)
    batch = batch_of(rows, 0, 1)
    assert batch.source.shape == (2, 24)
    assert batch.source_mask[0].all()
    assert batch.input_ids.shape == (2, 16)
    assert (batch.labels[1] != IGNORED).all()
    assert batch.source[0, -1] == batch.labels[1, -1] == tokenizer.eos_token_id


def test_a_feed_gives_each_rank_its_rows_of_the_same_batch(tokenizer):
    examples = [Example("mask " * (1 + k % 7), (f"live {k}", "dead " * (k % 5) + "x")) for k in range(12)]
    feed = PairFeed(rows_of(tokenizer, examples), 4, seed=1, window=3)
    for step in range(7):
        whole = feed.batch(step, range(4))
        parts = [feed.batch(step, [row]) for row in range(4)]
        for name in ("input_ids", "labels", "source", "source_mask"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert torch.equal(whole.rows(1, 3).source, whole.source[1:3])


def test_the_decoder_begins_with_the_languages_that_the_tokenizer_knows(tokenizer):
    assert first_tokens(tokenizer, TASK, 5, 32) == [5]
    hindi = Speech(data=NOWHERE, language="hi", translate=True)
    tokenizer = load(tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|hi|>", "<|translate|>", "<|notimestamps|>"]})
    assert first_tokens(tokenizer, hindi, 5, 32) == [5, *tokenizer.convert_tokens_to_ids(["<|hi|>", "<|translate|>", "<|notimestamps|>"])]
    with pytest.raises(ConfigError, match=r"Got none for <\|xx\|>, <\|transcribe\|>"):
        first_tokens(tokenizer, Speech(data=NOWHERE, language="xx"), 5, 32)
    with pytest.raises(ConfigError, match=r"a decoder_start_token_id in the model's config\. Got none"):
        first_tokens(tokenizer, TASK, None, 32)
    with pytest.raises(ConfigError, match=r"a context of at least 8: answers begin with 4 tokens\. Got 6"):
        first_tokens(tokenizer, hindi, 5, 6)
