"""`torchrun -m raysparse VERB --local`: the same run without Ray, on several ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import main


def torchrun(file: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launcher, "raysparse", "pretrain", str(file), "--local", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def config_file(pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(pretrain_values | {"run": pretrain_values["run"] | {"parity": True}}))
    return file


def test_two_ranks_of_torchrun_end_where_one_process_ends(config_file, pretrain_values, tmp_path, capfd):
    assert main(["pretrain", str(config_file), "--local", "--json", "run.name=alone"]) == 0
    alone = json.loads(capfd.readouterr().out)
    done = torchrun(config_file, "--json", "run.name=pair")
    assert done.returncode == 0, done.stderr
    pair = json.loads(done.stdout)  # printed once
    assert (alone["workers"], pair["workers"]) == (1, 2)
    assert pair["sparsity"] == alone["sparsity"]
    assert pair["loss"]["train"] == alone["loss"]["train"]
    runs = Path(pretrain_values["run"]["folder"])
    one, two = (load_file(runs / name / "export" / "model.safetensors") for name in ("alone", "pair"))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert done.stderr.count("validation loss") == 2  # rank 0's console, nobody else's
    again = torchrun(config_file, "run.name=pair", "training.sequences=5", "run.parity=false")
    assert again.returncode != 0
    assert again.stderr.count("Expected run.workers to divide training.sequences. Got 2 workers, 5 sequences.") == 1
