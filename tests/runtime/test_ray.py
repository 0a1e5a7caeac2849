"""On a real Ray: the same results as in this process. What happens to runs that are killed is in tests/chaos."""

import io
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysparse.config import ConfigError, merge
from raysparse.recipes import pretrain
from raysparse.runtime.launch import launch
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console
from tests.chaos.seen import differing

pytestmark = pytest.mark.ray


def config(values: dict[str, Any], **more: Any) -> pretrain.PretrainConfig:
    return pretrain.PretrainConfig.check(merge(values | {"kernels": "dense"}, more))  # auto is a measurement


def test_one_worker_equals_this_process(ray_instance, pretrain_values, tmp_path):
    here = config(pretrain_values, run={"name": "here"})
    there = config(pretrain_values, run={"name": "there"})
    jobs = pretrain.open_run(here), pretrain.open_run(there)
    quiet = Console(io.StringIO())
    (a,) = run_here([jobs[0]], here.run, quiet)
    (b,) = launch([jobs[1]], there.run, quiet)
    assert differing(*jobs) == []
    assert a["loss"] == b["loss"]
    assert a["sparsity"] == b["sparsity"]
    exported = [load_file(str(job.path / "export" / "model.safetensors")) for job in jobs]
    assert all(torch.equal(exported[0][key], exported[1][key]) for key in exported[0])


def test_more_workers_than_the_cluster_holds(ray_instance, pretrain_values):
    greedy = config(pretrain_values, run={"name": "greedy", "workers": 64}, training={"sequences": 64})
    job = pretrain.open_run(greedy)
    with pytest.raises(ConfigError, match=r"Expected a cluster with 64 CPU .* Got 4\. Lower run\.workers"):
        launch([job], greedy.run, Console())
