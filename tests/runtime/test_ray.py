"""On a real Ray: the same results as in this process, and what happens when a worker or the driver is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.config import ConfigError, merge
from raysparse.recipes import pretrain
from raysparse.recipes.job import Job
from raysparse.runtime.launch import launch
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console

pytestmark = pytest.mark.ray


def config(values: dict[str, Any], **more: Any) -> pretrain.PretrainConfig:
    return pretrain.PretrainConfig.check(merge(values | {"kernels": "dense"}, more))  # auto is a measurement


def trained(job: Job) -> dict[str, torch.Tensor]:
    """Weights and moments in the newest checkpoint, whole."""
    import torch.distributed.checkpoint as dcp

    from raysparse.train.checkpoint import newest
    from raysparse.train.process import process_group

    path = newest(job.path / "checkpoints")
    assert path is not None
    meta = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in meta.items() if key != "extra"}
    with process_group("cpu"):
        dcp.load(state, checkpoint_id=str(path))
    return state


def differing(a: Job, b: Job) -> list[str]:
    one, two = trained(a), trained(b)
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


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


def test_a_killed_worker_changes_nothing(ray_instance, pretrain_values):
    longer = {"training": {"length": 240, "validate_every": 240}, "checkpoint": {"every": 40}, "logging": {"every": 10}}
    attention = {"type": "local_or_strided", "width": 4, "stride": 4}
    timeline = [
        {"name": "warm_up", "length": "40 %", "sparsity": {"type": "polynomial"}, "attention": attention},
        {"name": "ultra", "length": "60 %"},
    ]
    longer["sparsity"] = {"evolution": {"type": "mixed", "update_interval": 7}, "timeline": timeline}
    calm = config(pretrain_values, run={"name": "calm", "workers": 2}, **longer)
    killed = config(pretrain_values, run={"name": "killed", "workers": 2}, **longer)
    jobs = pretrain.open_run(calm), pretrain.open_run(killed)
    quiet = Console(io.StringIO())
    (a,) = launch([jobs[0]], calm.run, quiet)
    victim: list[int] = []
    Thread(target=_kill_rank_1_at, args=(jobs[1], 90, victim), daemon=True).start()
    (b,) = launch([jobs[1]], killed.run, quiet)
    assert victim, "the worker ended before it could be killed"
    shown = (killed.run.path / "progress.jsonl").read_text()
    assert "going on from step_" in shown
    assert differing(*jobs) == []
    assert a["loss"] == b["loss"]
    assert a["flops"] == b["flops"]
    assert a["topology"]["updates"] == b["topology"]["updates"] == 33
    assert a["sparsity"] == b["sparsity"]
    histories = [[json.loads(line) for line in (job.path / "topology.jsonl").read_text().splitlines()] for job in jobs]
    assert [h[0]["attempt"] for h in histories] == [1, 2]
    assert [r["digest"] for r in histories[0][1:]] == [r["digest"] for r in histories[1][1:]]
    assert a["tokens"] == b["tokens"]
    steps = [json.loads(line)["step"] for line in (jobs[1].path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(10, 241, 10))


def _kill_rank_1_at(job: Job, step: int, victim: list[int]) -> None:
    """SIGKILL the second worker of the run once rank 0 has reported a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = (job.path / "metrics.jsonl").read_text().splitlines() if (job.path / "metrics.jsonl").exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            pids = json.loads((job.path / "workers.json").read_text())
            victim.append(pids[1])
            os.kill(pids[1], signal.SIGKILL)
            return
        time.sleep(0.02)


def test_more_workers_than_the_cluster_holds(ray_instance, pretrain_values):
    greedy = config(pretrain_values, run={"name": "greedy", "workers": 64}, training={"sequences": 64})
    job = pretrain.open_run(greedy)
    with pytest.raises(ConfigError, match=r"Expected a cluster with 64 CPU .* Got 4\. Lower run\.workers"):
        launch([job], greedy.run, Console())


@pytest.mark.slow
def test_rerunning_after_the_driver_died_resumes(pretrain_values, tmp_path):
    """The whole command as a user types it: killed with SIGKILL in mid-run, typed again, equal to one that was left alone."""
    longer = {"training": {"length": 600, "validate_every": 300}, "checkpoint": {"every": 50}, "logging": {"every": 20}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(merge(pretrain_values, longer)))
    command = [sys.executable, "-m", "raysparse", "pretrain", str(file), "run.workers=2", "--json"]
    first = subprocess.Popen([*command, "run.name=died"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = Path(pretrain_values["run"]["folder"]) / "died" / "checkpoints"
    deadline = time.monotonic() + 180
    while not list(checkpoints.glob("step_*/COMMITTED.json")):
        assert first.poll() is None, "the first run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint within 180 s"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = subprocess.run([*command, "run.name=died"], capture_output=True, text=True, timeout=300, check=True)
    assert "going on from step_" in again.stderr
    calm = subprocess.run([*command, "run.name=calm"], capture_output=True, text=True, timeout=300, check=True)
    a, b = json.loads(again.stdout), json.loads(calm.stdout)
    assert a["loss"] == b["loss"]
    assert a["sparsity"] == b["sparsity"]
    folder = Path(pretrain_values["run"]["folder"])
    weights = [load_file(str(folder / name / "export" / "model.safetensors")) for name in ("died", "calm")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
