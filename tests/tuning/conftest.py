"""A search that takes seconds: a tiny model, two sparsities, sixty pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysparse.config import merge


@pytest.fixture
def search_values(pretrain_values: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``search_values(**changes)`` -> the plain config of a search, whose files lie in the test's folder."""
    for split, number in (("train", 40), ("validation", 12), ("test", 7)):
        pairs = [{"source": f"mask {i} layer", "target": f"live {i % 3} rows"} for i in range(number)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    finetune = {
        "model": {"path": "runs/none"},
        "task": {"type": "seq2seq", "data": {"type": "folder", "path": str(tmp_path)}, "metrics": ["chrf", "bleu"]},
        "context": 16,
        "optimizer": {"lr": 1e-2},
        "training": {"length": 8, "sequences": 4, "micro": 2, "validate_every": 2, "validation_sequences": 8},
        "checkpoint": {"every": 2},
        "logging": {"every": 1},
        "generation": {"max_new_tokens": 4},
        "cache_dir": pretrain_values["data"]["cache_dir"],
        "kernels": "dense",
    }
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(pretrain_values | {"kernels": "dense"}))
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(finetune))
    values = {
        "run": pretrain_values["run"] | {"name": "search"},
        "pretrain": {"files": [str(tmp_path / "pretrain.yaml")], "space": {"sparsity.target": {"choice": [0.0, 0.75]}}},
        "tasks": {"pairs": {"files": [str(tmp_path / "finetune.yaml")], "space": {"optimizer.lr": {"choice": [1e-2, 1e-9]}}}},
    }
    return lambda **changes: merge(values, changes)


@pytest.fixture
def pruned_values(search_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``pruned_values(**changes)`` -> the same of one model, ``runs/dense``: as it is and pruned to 50 % in two ways, each fine-tuned with
    the dense one as its teacher."""
    values = search_values()
    data = yaml.safe_load((tmp_path / "finetune.yaml").read_text())
    calibration = {"samples": 8, "batch": 4, "validation_sequences": 4}
    prune = {"model": {"path": "runs/dense"}, "sparsity": {"target": 0.5}, "context": 16, "calibration": calibration}
    (tmp_path / "prune.yaml").write_text(yaml.safe_dump(prune | {key: data[key] for key in ("task", "cache_dir")}))
    space = {"sparsity.target": {"choice": [0.0, 0.5]}, "method.type": {"choice": ["magnitude", "wanda"]}}
    values |= {"pretrain": None, "prune": {"files": [str(tmp_path / "prune.yaml")], "space": space}}
    task = values["tasks"]["pairs"] | {"set": {"distillation": {"teacher": "runs/dense"}}}
    values["tasks"] = {"pairs": task | {"space": {"distillation.feature": {"choice": [0.5, 1.0]}}}}
    return lambda **changes: merge(values, changes)
