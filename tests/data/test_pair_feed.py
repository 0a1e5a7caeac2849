import pytest
import torch

from raysparse.config import ConfigError
from raysparse.data.batch import IGNORED
from raysparse.data.pairs import PairFeed, PairRows, PairValidation, encode_prompts
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.tasks import Example, Seq2seq
from raysparse.tasks.tables import PairFiles

TASK = Seq2seq(data=PairFiles(train="", validation="", test=""), separator="\n=> ")


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return load(train(TrainTokenizer(vocab_size=300), iter(texts), "corpus", tmp_path_factory.mktemp("cache")))


def examples(count=10):
    return [Example("mask " * (k + 1), (f"live {k}", f"dead {k}")) for k in range(count)]


def feed(tokenizer, pairs, context=64, sequences=4):
    return PairFeed(PairRows.encode(pairs, tokenizer, TASK, context), sequences, seed=1)


def validation(tokenizer, pairs, context=64, sequences=4):
    return PairValidation(PairRows.encode(pairs, tokenizer, TASK, context), sequences)


def texts_of(batch, row, tokenizer):
    """(what stands before the first label, what is to be predicted)"""
    counted = batch.labels[row] != IGNORED
    first = int(counted.nonzero()[0])
    return tokenizer.decode(batch.input_ids[row, : first + 1]), tokenizer.decode(batch.labels[row][counted])


def test_only_the_answer_and_its_end_are_predicted(tokenizer):
    batch = feed(tokenizer, [Example("sparse mask", ("dense grow",))], sequences=1).batch(0, [0])
    assert texts_of(batch, 0, tokenizer) == ("sparse mask\n=> ", "dense grow<|endoftext|>")
    num_tokens = int((batch.labels[0] != IGNORED).nonzero().max()) + 1
    assert tokenizer.decode(batch.input_ids[0, :num_tokens]) == "sparse mask\n=> dense grow"
    assert (batch.input_ids[0, num_tokens:] == tokenizer.pad_token_id).all()
    assert batch.input_ids.shape[1] % 8 == 0


def test_an_epoch_sees_every_reference_once(tokenizer):
    pairs = examples()
    data = feed(tokenizer, pairs)
    assert data.steps_per_epoch == 5
    seen = [texts_of(data.batch(step, range(4)), row, tokenizer) for step in range(10) for row in range(4)]
    wanted = sorted((f"{e.source}\n=> ", f"{r}<|endoftext|>") for e in pairs for r in e.references)
    assert sorted(seen[:20]) == sorted(seen[20:]) == wanted
    assert seen[:20] != seen[20:]


@pytest.mark.parametrize("kind", [feed, validation])
def test_shapes_and_rows_do_not_depend_on_the_world_size(tokenizer, kind):
    data = kind(tokenizer, examples())
    for step in range(5):
        whole = data.batch(step, range(4))
        parts = [data.batch(step, [row]) for row in range(4)]
        for name in ("input_ids", "labels"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_long_prompts_lose_their_end_but_not_the_separator(tokenizer):
    long, short = Example("mask " * 50, ("live",)), Example("mask", ("live",))
    data = validation(tokenizer, [long, short], context=32, sequences=2)
    batch = data.batch(0, [0, 1])
    assert batch.input_ids.shape == (2, 32)
    prompt, answer = texts_of(batch, 0, tokenizer)
    assert prompt.startswith("mask mask ")
    assert prompt.endswith("\n=> ")
    assert answer == "live<|endoftext|>"
    assert (data.rows.num_truncated, data.rows.num_truncated_targets) == (1, 0)


def test_long_answers_are_cut_to_half_the_context(tokenizer):
    data = validation(tokenizer, [Example("mask " * 50, ("live " * 50,)), Example("mask", ("live",))], context=30, sequences=1)
    batch = data.batch(0, [0])
    assert batch.num_targets == 16
    assert batch.input_ids.shape == (1, 30)
    assert (data.rows.num_truncated, data.rows.num_truncated_targets) == (1, 1)


def test_validation_is_spread_over_the_examples(tokenizer):
    data = validation(tokenizer, examples(5), sequences=2)
    whole = validation(tokenizer, examples(5), sequences=10)
    assert data.batch(0, [1]).labels[0].tolist() == data.batch(3, [1]).labels[0].tolist()
    counts = [whole.batch(0, [row]).num_targets for row in range(10)]
    assert [data.batch(0, [row]).num_targets for row in range(2)] == [counts[0], counts[5]]


def test_prompts_are_encoded_as_in_training(tokenizer):
    pairs = [Example("sparse mask", ("dense",)), Example("mask " * 50, ("live",))]
    prompts = encode_prompts(pairs, tokenizer, TASK, context=32, max_new_tokens=8)
    batch = validation(tokenizer, pairs, context=32, sequences=2).batch(0, [0])
    assert batch.input_ids[0, : len(prompts[0])].tolist() == prompts[0]
    assert len(prompts[1]) == 24
    assert tokenizer.decode(prompts[1]).endswith("\n=> ")


def test_a_special_token_is_one_in_the_separator_and_text_in_a_prompt(tokenizer):
    task = TASK.model_copy(update={"separator": "<|endoftext|>"})
    (prompt,) = encode_prompts([Example("a<|endoftext|>b", ("c",))], tokenizer, task, context=64, max_new_tokens=8)
    assert prompt.count(tokenizer.eos_token_id) == 1
    assert prompt[-1] == tokenizer.eos_token_id


def test_what_cannot_be_trained_on_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match=r"Expected examples to train or validate on\. Got none"):
        feed(tokenizer, [])
    with pytest.raises(ConfigError, match=r"Expected a target for every prompt\. Got none for 'mask'"):
        feed(tokenizer, [Example("mask", ("live", " "))])
    with pytest.raises(ConfigError, match=r"task\.separator of 1 to 2 tokens, a quarter of the context\. Got \d+ in '\\n=> '"):
        feed(tokenizer, examples(), context=8)
    with pytest.raises(ConfigError, match=r"room for a prompt in a context of 32 tokens\. Got 30 for the answer and \d+ for the"):
        encode_prompts(examples(), tokenizer, TASK, context=32, max_new_tokens=30)


def test_a_rank_without_examples_has_no_prompts(tokenizer):
    assert encode_prompts([], tokenizer, TASK, context=64, max_new_tokens=8) == []


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_is_sorted_by_length_and_every_pair_comes_once(tokenizer, window):
    pairs, sequences = examples(15), 2  # 30 pairs of rising length: 15 batches an epoch, whole windows
    rows = PairRows.encode(pairs, tokenizer, TASK, 64)
    sorted_feed, plain = (PairFeed(rows, sequences, 1, size) for size in (window, 1))
    for epoch in range(2):
        seen, expected, padded = [], [], 0
        for step in range(15 * epoch, 15 * (epoch + 1)):
            seen += [tuple(row) for row in rows_of(sorted_feed.batch(step, range(sequences)))]
            expected += [tuple(row) for row in rows_of(plain.batch(step, range(sequences)))]
            padded += sorted_feed.batch(step, range(sequences)).input_ids.numel()
        assert sorted(seen) == sorted(expected)
        assert (seen == expected) == (window == 1)
        if window > 1:
            assert padded < sum(plain.batch(step, range(sequences)).input_ids.numel() for step in range(15 * epoch, 15 * (epoch + 1)))
    later = PairFeed(rows, sequences, 1, window).batch(17, [1])  # resumed, and of another rank
    assert torch.equal(later.input_ids, sorted_feed.batch(17, range(sequences)).input_ids[1:])


def rows_of(batch):
    """Ids that are read or predicted, padding aside."""
    return [ids[: int((labels != IGNORED).nonzero()[-1]) + 1].tolist() for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
