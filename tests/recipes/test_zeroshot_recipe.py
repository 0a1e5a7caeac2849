"""`raysparse zeroshot` as a user runs it."""

import json

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from raysparse.__main__ import main
from raysparse.data.tokenizer import TrainTokenizer, load, train


@pytest.fixture
def values(tmp_path):
    tokenizer = load(train(TrainTokenizer(vocab_size=300), iter(["the mask is live " * 20]), "x", tmp_path / "cache"))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"query": "the mask " * k, "choices": ["is live", "dead"], "gold": k % 2} for k in range(1, 8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "asked", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"path": str(tmp_path / "model")},
        "task": {"type": "choices", "files": str(tmp_path / "rows.jsonl")},
        "context": 16,
        "cache_dir": str(tmp_path / "cache"),
    }


def ask(tmp_path, values, *words):
    (tmp_path / "zeroshot.yaml").write_text(yaml.safe_dump(values))
    return main(["zeroshot", str(tmp_path / "zeroshot.yaml"), *words])


def test_scores_and_predictions(tmp_path, values, capsys):
    assert ask(tmp_path, values, "--local", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    told = summary["zeroshot"]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "asked" / "predictions.jsonl").read_text().splitlines()]
    assert told["num_examples"] == len(lines) == 7
    assert told["num_truncated"] > 0
    hits = [max(range(2), key=lambda k, row=row: row["logprobs"][k]) == row["gold"] for row in lines]
    assert told["scores"]["accuracy"] == sum(hits) / 7
    assert ask(tmp_path, values, "--local") == 0  # finished: said again, nothing computed
    assert "accuracy_norm" in capsys.readouterr().out


def test_text(tmp_path, values, capsys):
    (tmp_path / "a.txt").write_text("the mask is live " * 30)
    values["task"] = {"type": "text", "files": str(tmp_path / "a.txt")}
    assert ask(tmp_path, values, "--local", "--json") == 0
    whole = json.loads(capsys.readouterr().out)["zeroshot"]["scores"]
    values["run"]["name"], values["task"]["stride"] = "strided", 4
    assert ask(tmp_path, values, "--local", "--json") == 0
    strided = json.loads(capsys.readouterr().out)["zeroshot"]["scores"]
    assert strided["tokens"] == whole["tokens"]
    assert strided["perplexity"] != whole["perplexity"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"type": "text", "files": "rows.jsonl", "stride": 17}}, "Expected task.stride within the context of 16. Got 17"),
        ({"model": {"preset": "debug"}}, "Expected model.path for an evaluation"),
        ({"context": 64}, "32"),
        ({"task": {"type": "choices", "files": "nowhere.jsonl"}}, "Expected a file, or a glob that matches some"),
    ],
)
def test_wrong_configs_start_nothing(tmp_path, values, capsys, changes, message):
    assert ask(tmp_path, values | changes, "--local") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
