"""Likelihoods one token at a time, and the scores that are made of them."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raysparse.config import ConfigError
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.tasks.likelihood import Likelihood, likelihoods, merged, of_pair, of_text
from raysparse.tasks.zeroshot import Choices, Classify, Item, LastWord, Text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(train(TrainTokenizer(vocab_size=300), iter(["the mask is live " * 20]), "x", tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def plain(model, ids, predicted):
    """Sum of log-probabilities of the last tokens, a token at a time."""
    total, greedy = 0.0, True
    for place in range(len(ids) - predicted, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[place]])
        greedy &= int(logits.argmax()) == ids[place]
    return total, greedy


def compute(model, requests, batch_size=3, ranks=1):
    parts = [likelihoods(lambda ids: model(ids).logits, requests, CPU, batch_size, rank, ranks, False) for rank in range(ranks)]
    return list(merged(parts, len(requests)))


PAIRS = [("the mask", " is live"), ("", "live"), ("the mask is \n", "live the"), ("is " * 30, "mask"), ("live", " the mask is live the")]


def test_likelihoods_are_those_of_one_token_at_a_time(model, tokenizer):
    requests = [of_pair(*pair, tokenizer, 24) for pair in PAIRS]
    found = compute(model, requests)
    for (context, continuation), (windows, cut), one in zip(PAIRS, requests, found, strict=True):
        whole = tokenizer(context + continuation)["input_ids"]
        ids = (whole if context else [tokenizer.eos_token_id, *whole])[-25:]
        assert list(windows[0].ids) == ids
        assert one.cut == cut == max(0, len(whole) - 25)
        total, greedy = plain(model, ids, windows[0].predicted)
        assert one.logprob == pytest.approx(total, abs=1e-4)
        assert one.greedy == greedy
    assert requests[2][0][0].predicted == len(tokenizer(" \nlive the")["input_ids"])  # the space at the end belongs to what follows
    assert found[3].cut > 0


def test_a_continuation_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(ConfigError, match=r"Expected a continuation within the context of 8 tokens\. Got \d+: ' dead dead"):
        of_pair("live", " dead" * 9, tokenizer, 8)


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (40, 40), (3, 1)])
def test_every_token_of_a_text_is_predicted_once(model, tokenizer, length, stride):
    text = "the mask is live " * 6 + "dead"
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    windows, cut = of_text(text, tokenizer, length, stride)
    assert cut == 0
    assert sum(window.predicted for window in windows) == len(ids) - 1
    at = 1
    for window in windows:
        assert len(window.ids) <= length + 1
        assert list(window.ids) == ids[at + window.predicted - len(window.ids) : at + window.predicted]
        at += window.predicted
    (one,) = compute(model, [(windows, cut)])
    assert one.logprob == pytest.approx(sum(plain(model, list(window.ids), window.predicted)[0] for window in windows), abs=1e-3)
    assert one.tokens == len(ids) - 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_finds_the_same(model, tokenizer, ranks):
    requests = [of_pair(*pair, tokenizer, 24) for pair in PAIRS] + [of_text("the mask is live " * 9, tokenizer, 16, 8)]
    assert compute(model, requests, 2, ranks) == compute(model, requests, 2)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def like(*logprobs, greedy=True):
    return [Likelihood(value, greedy, 2, 0) for value in logprobs]


def test_last_word(tmp_path):
    columns = write(tmp_path / "a.jsonl", [{"context": "He saw the ", "continuation": "moon"}])
    passages = write(tmp_path / "b.jsonl", [{"text": "He saw the moon"}])
    items = LastWord(files=columns).items()
    assert items == LastWord(files=passages, text="text").items() == [Item((("He saw the", " moon"),))]
    scores = LastWord(files=columns).scores(items * 3, [like(-1.0), like(-3.0, greedy=False), like(-2.0)])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["accuracy_stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))
    assert scores["perplexity"] == pytest.approx(math.exp(2))
    assert scores["perplexity_stderr"] == pytest.approx(math.exp(2) / math.sqrt(3))


def test_choices(tmp_path):
    query = {"query": "Why?", "choices": ["Because it is so.", "No"], "gold": 0}
    contexts = {"context_options": ["Ann so Ann", "Ann so Eve"], "continuation": "left.", "gold": 1}
    task = Choices(files=write(tmp_path / "a.jsonl", [query, contexts]))
    items = task.items()
    assert items[0] == Item((("Why?", " Because it is so."), ("Why?", " No")), 0)
    assert items[1] == Item((("Ann so Ann", " left."), ("Ann so Eve", " left.")), 1)
    #  the longer right answer has the smaller sum, and the larger mean over its 17 characters against 2
    scores = task.scores(items, [like(-8.0, -4.0), like(-3.0, -2.0)])
    assert (scores["accuracy"], scores["accuracy_norm"]) == (0.5, 1.0)


def test_classify_with_solved_examples(tmp_path):
    rows = [{"sentence1": f"a{k}", "sentence2": f"b{k}", "label": k % 2} for k in range(6)]
    train, test = (write(tmp_path / f"{name}.jsonl", of) for name, of in (("train", rows), ("test", rows[:4])))
    settings = {"files": (test,), "template": "{sentence1}|{sentence2}:", "labels": {0: " no", 1: " yes"}, "positive": "1"}
    task = Classify(**settings)
    assert task.items()[1] == Item((("a1|b1:", " no"), ("a1|b1:", " yes")), 1)
    few = Classify(**settings, shots=2, shot_files=(train,), seed=3)
    items = few.items()
    assert items == few.items() != Classify(**settings, shots=2, shot_files=(train,), seed=4).items()
    for item, bare in zip(items, task.items(), strict=True):
        first, second, prompt = item.pairs[0][0].split("\n\n")
        assert first != second
        assert prompt == bare.pairs[0][0]
        assert all(shot.endswith((" no", " yes")) for shot in (first, second))
    #  gold 0 1 0 1, chosen 0 1 1 0: one hit, one false positive, one false negative
    scores = task.scores(task.items(), [like(0.0, -1.0), like(-1.0, 0.0), like(-1.0, 0.0), like(0.0, -1.0)])
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == 0.5


def test_text_units(tmp_path):
    (tmp_path / "a.txt").write_text("two words é")
    task = Text(files=str(tmp_path / "a.txt"))
    scores = task.scores(task.items(), [[Likelihood(-12.0, False, 6, 0)]])
    assert scores["perplexity"] == pytest.approx(math.exp(2))
    assert scores["word_perplexity"] == pytest.approx(math.exp(4))
    assert scores["byte_perplexity"] == pytest.approx(math.exp(1))
    assert scores["bits_per_byte"] == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (LastWord, {"context": "a b"}, r"Expected a column 'continuation' at .*jsonl:1"),
        (LastWord, {"context": "a b", "continuation": " "}, r"Expected a passage and its last word at .*jsonl:1"),
        (Choices, {"query": "a", "choices": ["b", "c"], "gold": 2}, r"the number of one of 2 choices, none empty, at .*jsonl:1\. Got 2"),
        (Choices, {"query": "a", "choices": ["b", ""], "gold": 0}, r"none empty, at .*jsonl:1"),
        (Choices, {"question": "a"}, r"Expected a column 'query' at .*jsonl:1"),
    ],
)
def test_bad_rows_are_named(tmp_path, kind, row, message):
    with pytest.raises(ConfigError, match=message):
        kind(files=write(tmp_path / "a.jsonl", [row])).items()


def test_bad_labels_and_shots(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"s": "x", "label": 2}])
    with pytest.raises(ConfigError, match=r"Expected a label among 0, 1 at .*jsonl:1\. Got '2'"):
        Classify(files=file, template="{s}", labels={0: " a", 1: " b"}).items()
    with pytest.raises(ConfigError, match="Expected shots and shot_files together"):
        Classify.check({"files": file, "template": "{s}", "labels": {0: " a", 1: " b"}, "shots": 1})
    shots = write(tmp_path / "b.jsonl", [{"s": "x", "label": 1}])
    with pytest.raises(ConfigError, match=r"Expected 5 examples in .* Got 1"):
        Classify(files=shots, template="{s}", labels={0: " a", 1: " b"}, shots=5, shot_files=shots).items()
    with pytest.raises(ConfigError, match="Expected positive among the labels 0, 1"):
        Classify.check({"files": file, "template": "{s}", "labels": {0: " a", 1: " b"}, "positive": "yes"})
