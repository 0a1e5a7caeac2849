"""A model's answers, its perplexity and the scores of both, on one rank and on several."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raysparse.config import ConfigError
from raysparse.data.pairs import PairRows
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.recipes.evaluate import EvaluationConfig, check_task, score_model
from raysparse.runtime.local import LocalRun
from raysparse.tasks import Example, Seq2seq, WebNLG
from raysparse.tasks.generate import GenerationConfig
from raysparse.tasks.tables import PairFiles
from raysparse.train.metrics import Console
from tests.ranks import spawn

NOWHERE = PairFiles(train="", validation="", test="")
EXAMPLES = [
    Example(f"mask {'live ' * (k % 4)}{k}", (f"the layer {k}", "dead")[: 1 + k % 2], ("seen", "unseen")[k % 3 == 0]) for k in range(11)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = load(train(TrainTokenizer(vocab_size=300), iter(["the mask is live " * 20]), "x", tmp_path_factory.mktemp("cache")))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3)
    path = tmp_path_factory.mktemp("model")
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def scored(folder, out, task_type, metrics, settings):
    task = {"webnlg": WebNLG, "seq2seq": Seq2seq}[task_type](data=NOWHERE, metrics=metrics)
    run = LocalRun(Console())
    return score_model(
        folder, Path(out), task, EXAMPLES, 40, GenerationConfig(batch_size=2, max_new_tokens=5, **settings), EvaluationConfig(), run, "cpu"
    )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"temperature": 1.0}], ids=["greedy", "beams", "drawn"])
def test_three_workers_answer_as_one(folder, tmp_path, settings):
    found = {}
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        out.mkdir()
        results = spawn(scored, ranks, str(folder), str(out), "webnlg", ("chrf", "perplexity"), settings)
        for result in results:
            result.pop("tokens_per_s")
            assert result == results[0]
        found[ranks] = (results[0], (out / "predictions.jsonl").read_text())
    assert found[1][1] == found[3][1]
    perplexity = [result["scores"].pop("perplexity") for result, _ in found.values()]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-6)
    assert found[1][0] == found[3][0]
    result, lines = found[1]
    assert [result["subsets"][name]["num_examples"] for name in ("seen", "unseen")] == [7, 4]
    assert [json.loads(line)["references"] for line in lines.splitlines()] == [list(example.references) for example in EXAMPLES]
    assert set(result["baseline"]) == {"chrf"}


def test_perplexity_is_of_the_answers_tokens(folder, tmp_path):
    """Without padding or batches: the mean over all tokens of all references, end of text included."""
    (result,) = spawn(scored, 1, str(folder), str(tmp_path), "seq2seq", ("perplexity",), {})
    assert not (tmp_path / "predictions.jsonl").exists()
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), load(folder)
    rows, losses = PairRows.encode(EXAMPLES, tokenizer, Seq2seq(data=NOWHERE), 40), []
    for k in range(len(rows)):
        ids = torch.from_numpy(rows.ids[rows.first[k] : rows.first[k + 1]].astype("int64"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0].log_softmax(-1)
        losses += [-float(logits[place - 1, ids[place]]) for place in range(rows.num_prompt[k], len(ids))]
    assert len(losses) > 3 * len(rows)
    assert result["scores"] == {"perplexity": pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)}
    assert result["baseline"] == result["subsets"] == {}


def test_a_primary_metric_that_cannot_be_computed_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("raysparse.tasks.metrics.scripts.shutil.which", lambda name: None)
    monkeypatch.setattr("raysparse.tasks.metrics.scripts._missing", lambda *names, java=False: "needs Java" if java else None)
    task = WebNLG(data=NOWHERE, metrics=("webnlg_meteor", "webnlg_bleu"))
    with pytest.raises(ConfigError, match=r"Got webnlg_meteor, which needs Java\. Install that, or begin task\.metrics with one of bleu"):
        check_task(task)
