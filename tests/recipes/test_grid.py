"""`raysparse finetune --grid`: every combination, the best by validation scored on the test split."""

import json
from pathlib import Path

import pytest
import yaml

from raysparse.__main__ import main
from raysparse.config import ConfigError, load
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.grid import combinations, points

CONFIGS = Path(__file__).parents[2] / "configs" / "finetune"


@pytest.mark.parametrize(("name", "size"), [("e2e", 12), ("webnlg", 12), ("dart", 12), ("curation", 6)])
def test_the_papers_grids(name, size, tmp_path):
    config = load(FinetuneConfig, [CONFIGS / f"{name}.yaml"], [f"run.folder={tmp_path}"])
    stages = points(config)
    assert len(stages) == len(combinations(config)) == size
    assert {stage.evaluation.split for stage in stages.values()} == {"validation"}
    if name != "curation":
        assert {(stage.training.sequences, stage.optimizer.lr) for stage in stages.values()} == {
            (sequences, lr) for sequences in (8, 16, 32, 64) for lr in (1e-4, 5e-5, 2.5e-5)
        }
    else:
        assert {stage.optimizer.lr for stage in stages.values()} == {3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5}
        assert {stage.training.sequences for stage in stages.values()} == {32}


def test_the_best_point_is_scored_on_the_test_split(tmp_path, pretrain_values, capsys):
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(pretrain_values))
    assert main(["pretrain", str(tmp_path / "pretrain.yaml"), "--local"]) == 0
    for split, number in (("train", 40), ("validation", 10), ("test", 7)):
        pairs = [{"source": f"mask {i} layer", "target": f"live {i}"} for i in range(number)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = {
        "run": pretrain_values["run"] | {"name": "tuned"},
        "model": {"path": str(Path(pretrain_values["run"]["folder"]) / "tiny")},
        "task": {"type": "seq2seq", "data": {"type": "folder", "path": str(tmp_path)}, "metrics": ["perplexity"]},
        "context": 16,
        "training": {"length": 6, "sequences": 4, "micro": 2, "validation_sequences": 8},
        "generation": {"max_new_tokens": 4},
        "grid": {"optimizer.lr": [1e-9, 1e-2], "training.sequences": [4]},
        "cache_dir": pretrain_values["data"]["cache_dir"],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["finetune", str(tmp_path / "grid.yaml"), "--local", "--grid", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [point["name"] for point in facts["points"]] == ["lr1e-09-sequences4", "lr0.01-sequences4"]
    assert facts["best"] == "lr0.01-sequences4"
    assert facts["points"][1]["perplexity"] < facts["points"][0]["perplexity"]
    runs = Path(pretrain_values["run"]["folder"]) / "tuned"
    final = json.loads((runs / "best" / "summary.json").read_text())["task"]
    assert (final["split"], final["num_examples"], final["scores"]) == ("test", 7, facts["scores"])
    assert json.loads((runs / "grid.json").read_text()) == facts
    assert main(["finetune", str(tmp_path / "grid.yaml"), "--local", "--grid"]) == 0  # all of it is finished
    assert "lr0.01-sequences4 *" in capsys.readouterr().out


def test_a_grid_without_keys_or_with_wrong_ones(tmp_path):
    config = load(FinetuneConfig, [CONFIGS / "gsm8k.yaml"], [f"run.folder={tmp_path}"])
    with pytest.raises(ConfigError, match=r"Expected keys and their values in grid\. Got none"):
        points(config)
    wrong = config.model_copy(update={"grid": {"optimizer.rate": (1, 2)}})
    with pytest.raises(ConfigError, match=r"optimizer\.rate: no such key"):
        points(wrong)
