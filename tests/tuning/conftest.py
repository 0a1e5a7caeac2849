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
