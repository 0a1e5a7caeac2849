"""Sparse fine-tuning with a teacher, from the command's config to the metrics, and what is refused before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from raysparse.config import ConfigError, merge
from raysparse.recipes import finetune, pretrain
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console


def carry_out(job, config, tmp_path) -> dict[str, Any]:
    with (tmp_path / "console.txt").open("w") as stream:
        (summary,) = run_here([job], config.run, Console(stream))
    return summary


@pytest.fixture
def values(pretrain_values, tmp_path) -> dict[str, Any]:
    """A fine-tuning of a finished sparse run, by a dense one of the same size."""
    for name, target in (("tiny", 0.75), ("dense", 0.0)):
        config = PretrainConfig.check(merge(pretrain_values, {"run": {"name": name}, "sparsity": {"target": target}}))
        carry_out(pretrain.open_run(config), config, tmp_path)
    pairs = [{"source": f"mask {i} layer", "target": f"live {i}"} for i in range(40)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    runs = Path(pretrain_values["run"]["folder"])
    return {
        "run": pretrain_values["run"] | {"name": "taught"},
        "model": {"path": str(runs / "tiny")},
        "task": {"type": "seq2seq", "data": {"type": "files"} | files, "metrics": ["chrf"]},
        "context": 16,
        "sparsity": {"masks": "keep"},
        "distillation": {"teacher": str(runs / "dense"), "logit": 1.0},
        "optimizer": {"lr": 1e-2},
        "training": {"length": 30, "sequences": 4, "micro": 2, "validate_every": 15, "validation_sequences": 8},
        "logging": {"every": 5},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"max_examples": 4},
        "cache_dir": pretrain_values["data"]["cache_dir"],
    }


def test_a_sparse_student_learns_from_its_teacher_and_stays_sparse(values, tmp_path):
    config = FinetuneConfig.check(merge(values, {"distillation": {"task": 0.0}}))  # it has not learned the task itself
    summary = carry_out(finetune.open_run(config), config, tmp_path)
    assert summary["sparsity"]["actual"] == pytest.approx(0.75, abs=1e-3)
    assert 0.5 < summary["flops"]["teacher"] / (summary["flops"]["dense"] / 3) < 1  # a forward pass, and logits of predicted tokens alone
    records = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    told = [record for record in records if "loss" in record]
    assert len(told) == 6
    for part in ("logit_loss", "feature_loss"):
        assert told[-1][part] < 0.9 * told[0][part]
    assert "teacher" in json.loads((config.run.path / "content.json").read_text())


def test_another_teacher_makes_another_run(values, tmp_path):
    config = FinetuneConfig.check(values)
    carry_out(finetune.open_run(config), config, tmp_path)
    other = FinetuneConfig.check(merge(values, {"distillation": {"teacher": values["model"]["path"]}}))
    with pytest.raises(ConfigError, match=r"Got other values of: distillation\.teacher"):
        finetune.open_run(other)


def test_a_teacher_of_another_size_is_refused(values, pretrain_values, tmp_path):
    wide = merge(
        pretrain_values, {"run": {"name": "wide"}, "model": {"overrides": {"n_embd": 48, "n_layer": 3}}, "sparsity": {"target": 0.0}}
    )
    config = PretrainConfig.check(wide)
    carry_out(pretrain.open_run(config), config, tmp_path)
    given = FinetuneConfig.check(merge(values, {"distillation": {"teacher": str(config.run.path)}}))
    with pytest.raises(ConfigError, match=r"Got num_hidden_layers 3 instead of 2, hidden_size 48 instead of 32\. Take the dense model"):
        finetune.open_run(given)
    assert not given.run.path.exists()


def test_a_teacher_that_is_not_finished_is_refused(values, tmp_path):
    given = FinetuneConfig.check(merge(values, {"distillation": {"teacher": str(tmp_path / "nothing")}}))
    with pytest.raises(ConfigError, match=r"Expected a model folder"):
        finetune.open_run(given)
