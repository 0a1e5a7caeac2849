"""Early stopping by the task's own score."""

import json
from pathlib import Path

import pytest
import yaml

from raysparse.__main__ import main


@pytest.fixture
def finetune(tmp_path, pretrain_values, capsys):
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(pretrain_values))
    assert main(["pretrain", str(tmp_path / "pretrain.yaml"), "--local"]) == 0
    for split in ("train", "validation", "test"):
        pairs = [{"source": f"mask {i} layer", "target": f"live {i % 3} rows"} for i in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = {
        "run": pretrain_values["run"],
        "model": {"path": str(Path(pretrain_values["run"]["folder"]) / "tiny")},
        "context": 16,
        "training": {"length": 12, "sequences": 4, "micro": 2, "validate_every": 2, "validation_sequences": 8, "patience": 2},
        "optimizer": {"lr": 1e-2},
        "generation": {"max_new_tokens": 6},
        "validate_by": "metric",
        "validate_examples": 7,
        "cache_dir": pretrain_values["data"]["cache_dir"],
    }

    def start(name, metric):
        task = {"type": "seq2seq", "data": {"type": "folder", "path": str(tmp_path)}, "metrics": [metric]}
        more = {"task": task, "run": values["run"] | {"name": name}}
        (tmp_path / "tune.yaml").write_text(yaml.safe_dump(values | more))
        capsys.readouterr()
        assert main(["finetune", str(tmp_path / "tune.yaml"), "--local", "--json"]) == 0
        folder = Path(values["run"]["folder"]) / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return json.loads(capsys.readouterr().out), [line for line in lines if "validation_loss" in line], folder

    return start


@pytest.mark.parametrize(("metric", "better"), [("chrf", max), ("wer", min)])
def test_the_best_score_is_kept(finetune, metric, better):
    summary, validations, folder = finetune(metric, metric)
    scores = [line["validation_score"] for line in validations]
    assert {line["score"] for line in validations} == {metric}
    best = validations[scores.index(better(scores))]["step"]
    assert summary["loss"]["step"] == best
    assert summary["steps"] == validations[-1]["step"]
    stopped = [step for step in (line["step"] for line in validations) if step > best]
    assert len(stopped) <= 2  # patience
    assert len((folder / "validated" / "predictions.jsonl").read_text().splitlines()) == 7


def test_perplexity_is_the_loss(finetune):
    _, validations, folder = finetune("ppl", "perplexity")
    assert all("validation_score" not in line for line in validations)
    assert not (folder / "validated").exists()
