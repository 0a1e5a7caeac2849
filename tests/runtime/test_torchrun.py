"""`torchrun -m raysparse VERB`: the same run without Ray, on several ranks. (torchrun takes --local for one of its own options.)"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import main
from tests.ranks import spawn


@pytest.fixture
def config_file(pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(pretrain_values | {"run": pretrain_values["run"] | {"parity": True}}))
    return file


def as_torchrun(file: str) -> tuple[int, str, str]:
    """The command on a rank that has torchrun's variables: (exit status, stdout, stderr)."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(TORCHELASTIC_RUN_ID="test", RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["pretrain", file, "--json", "run.name=pair"])
    return status, out.getvalue(), err.getvalue()


def test_ranks_of_torchrun_end_where_one_process_ends(config_file, pretrain_values, capfd):
    assert main(["pretrain", str(config_file), "--local", "--json", "run.name=alone"]) == 0
    alone = json.loads(capfd.readouterr().out)
    (status, out, err), others = spawn(as_torchrun, 2, str(config_file))
    assert status == 0, err
    assert others == (0, "", "")  # one of them speaks
    assert "validation loss" in err
    pair = json.loads(out)
    assert (alone["workers"], pair["workers"]) == (1, 2)
    assert pair["sparsity"] == alone["sparsity"]
    assert pair["loss"]["train"] == alone["loss"]["train"]
    runs = Path(pretrain_values["run"]["folder"])
    one, two = (load_file(runs / name / "export" / "model.safetensors") for name in ("alone", "pair"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [([], "pair is finished"), (["run.parity=false", "training.sequences=5"], "Got 2 workers, 5 sequences.")],
    ids=["trains", "refuses"],
)
def test_torchrun_itself(config_file, words, text):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launcher, "raysparse", "pretrain", str(config_file), "run.name=pair", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode == 0) == (words == []), done.stderr
    assert (done.stdout + done.stderr).count(text) == 1
