"""`raysparse gradual`: stages that each go on from the one before, masks that are nested, and a table at the end."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import main
from raysparse.config import ConfigError
from raysparse.recipes import pretrain
from raysparse.recipes.gradual import GradualConfig, open_runs
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console


@pytest.fixture
def values(pretrain_values, tmp_path) -> dict[str, Any]:
    config = PretrainConfig.check(pretrain_values | {"sparsity": {"target": 0}})
    job = pretrain.open_run(config)
    with (tmp_path / "console.txt").open("w") as stream:
        run_here([job], config.run, Console(stream))
    for split in ("train", "validation", "test"):
        rows = [json.dumps({"source": f"layer {k}", "target": f"live {k}"}) for k in range(12)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    common = {"task": {"type": "seq2seq", "data": {"type": "files", **paths}}, "context": 16, "cache_dir": str(tmp_path)}
    calibration = {"samples": 8, "validation_sequences": 4}
    files = {
        "prune": common | {"model": {"path": "elsewhere"}, "sparsity": {"target": 0.1}, "calibration": calibration},
        "finetune": common
        | {
            "model": {"path": "elsewhere"},
            "training": {"length": 2, "sequences": 4, "micro": 4, "validation_sequences": 4},
            "generation": {"max_new_tokens": 3},
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {
        "run": {"name": "stages", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"path": str(job.path)},
        "levels": [0.5, 0.75, 0.9],
        "prune": {"files": [str(tmp_path / "prune.yaml")]},
        "finetune": {"files": [str(tmp_path / "finetune.yaml")]},
    }


def test_each_stage_goes_on_from_the_one_before(values, tmp_path, capsys):
    file = tmp_path / "gradual.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["gradual", str(file), "--local", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [round(row["sparsity"], 3) for row in facts["levels"]] == [0.5, 0.75, 0.9]
    folder = tmp_path / "runs" / "stages"
    masks = [
        load_file(folder / f"{stage}-{level:g}" / "export" / "masks.safetensors")
        for level in values["levels"]
        for stage in ("prune", "tune")
    ]
    for earlier, later in pairwise(masks):
        assert all(torch.equal(later[name] & earlier[name], later[name]) for name in earlier)
    pruned = json.loads((folder / "prune-0.75" / "summary.json").read_text())
    assert Path(pruned["model"]["path"]) == folder / "tune-0.5" / "export"
    told = (folder / "gradual.md").read_text()
    assert all(f"{row['sparsity']:.4f}" in told for row in facts["levels"])
    before = (folder / "tune-0.9" / "summary.json").stat().st_mtime_ns
    assert main(["gradual", str(file), "--local"]) == 0  # finished stages are left as they are
    assert (folder / "tune-0.9" / "summary.json").stat().st_mtime_ns == before
    assert "Stages of stages" in capsys.readouterr().out


def test_levels_rise_and_nothing_is_opened_before_all_is_checked(values, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"Expected levels that rise\. Got 0\.5, 0\.9, 0\.75"):
        GradualConfig.check(values | {"levels": [0.5, 0.9, 0.75]})
    file = tmp_path / "gradual.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["gradual", str(file), "--dry-run", "model.path=nowhere/at/all"]) == 2
    assert main(["gradual", str(file), "--dry-run"]) == 0
    assert "Nothing was started" in capsys.readouterr().out
    config = GradualConfig.check(values | {"model": {"preset": "debug"}})
    with pytest.raises(ConfigError, match=r"Expected model\.path: a trained model"):
        open_runs(config)
    assert not (tmp_path / "runs" / "stages").exists()
