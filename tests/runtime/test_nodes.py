"""Several Ray nodes: the masks of one worker on two nodes of two, FSDP2 and HSDP."""

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

from raysparse.config import merge
from raysparse.recipes import pretrain
from raysparse.recipes.job import Job
from raysparse.runtime.local import run_here
from raysparse.sparsity.manager import MaskManager
from raysparse.train.metrics import Console
from raysparse.train.state import HISTORY

RULES = {"static": False, "set": True, "rigl": True, "mixed": True}
"""Rule -> whether it looks at weights or gradients, and so wants equal bits of them (`run.parity`) for equal masks."""
SHARDINGS = {"fsdp2": {}, "hsdp": {"replicas": 2}}


def values(base: dict[str, Any], name: str, rule: str, **more: Any) -> dict[str, Any]:
    evolution = {"type": rule} | ({} if rule == "static" else {"update_interval": 2})
    sections = {"run": {"name": name, "parity": RULES[rule]}, "sparsity": {"evolution": evolution}, "kernels": "dense"}
    return merge(merge(base, sections), more)


def script(module: str, files: list[Path], timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.runtime.{module}", *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def alone(wanted: dict[str, Any]) -> Job:
    """Train in this process."""
    config = pretrain.PretrainConfig.check(merge(wanted, {"run": {"workers": 1}, "sharding": {"replicas": 1}}))
    job = pretrain.open_run(config)
    run_here([job], config.run, Console(io.StringIO()))
    return job


def digests(job: Path) -> list[tuple[int, str]]:
    """(step, digest of the masks) of every version."""
    return [(record["step"], record["digest"]) for record in MaskManager(job / HISTORY).history()]


def weights(job: Path) -> dict[str, torch.Tensor]:
    return load_file(str(job / "export" / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.ray
def test_two_nodes_of_two_workers_have_the_masks_of_one(pretrain_values, tmp_path):
    cases = {f"{rule}-{sharding}": (rule, sharding) for rule in RULES for sharding in SHARDINGS}
    files = []
    for name, (rule, sharding) in cases.items():
        wanted = values(pretrain_values, name, rule, sharding=SHARDINGS[sharding])
        wanted["run"]["workers"] = 4
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(wanted))
    script("four_workers", files, 800)
    runs = Path(pretrain_values["run"]["folder"])
    shown = (runs / "progress.jsonl").read_text()
    assert "lie on several machines" not in shown
    for rule in RULES:
        one = alone(values(pretrain_values, f"{rule}-alone", rule)).path
        for name in (name for name, case in cases.items() if case[0] == rule):
            assert json.loads((runs / name / "summary.json").read_text())["workers"] == 4
            assert digests(runs / name) == digests(one), name
            assert (len(digests(one)) > 3) == (rule != "static")
            a, b = weights(one), weights(runs / name)
            if RULES[rule]:
                assert [key for key in a if not torch.equal(a[key], b[key])] == [], name
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def records(job: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("rule", ["static", "mixed"])
def test_a_run_goes_on_smaller_and_grows_again(pretrain_values, tmp_path, rule):
    """Five sequences: 3 and 2 on two workers. Static masks without parity, so weights differ by rounding; MST's with it, so by nothing."""
    wanted = values(pretrain_values, "elastic", rule)
    wanted = merge(wanted, {"training": {"length": 1200, "sequences": 5, "validate_every": 1200}, "checkpoint": {"every": 20}})
    wanted = merge(wanted, {"run": {"workers": [1, 2]}, "logging": {"every": 1}})
    if rule == "static":
        wanted = merge(wanted, {"optimizer": {"lr": 1e-3}})  # what rounding grows to follows the rate
    else:
        wanted = merge(wanted, {"sparsity": {"evolution": {"update_interval": 40}}})
    file = tmp_path / "elastic.yaml"
    file.write_text(yaml.safe_dump(wanted))
    told = json.loads(script("lost_and_found", [file], 800).stdout.splitlines()[-1])
    print(told)
    run = Path(pretrain_values["run"]["folder"]) / "elastic"
    whole = alone(merge(wanted, {"run": {"name": "alone"}})).path
    one, two = records(whole), records(run)
    sizes = [record["workers"] for record in two]
    assert [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] != size] == [2, 1, 2]
    assert [(r["step"], r["tokens"], r["flops"]) for r in two] == [(r["step"], r["tokens"], r["flops"]) for r in one]
    assert digests(run) == digests(whole)
    a, b = weights(whole), weights(run)
    if RULES[rule]:
        assert [r["loss"] for r in two] == [r["loss"] for r in one]
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    else:
        assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-3)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)
    (lost, _), (kept, at) = restarts(Path(pretrain_values["run"]["folder"]) / "elastic")
    assert 0 <= lost <= 20  # steps that were done again: of the node that died up to a checkpoint's interval
    assert kept == 0, f"the smaller group did not save step {at} before it grew"


def restarts(job: Path) -> list[tuple[int, int]]:
    """(steps that were done again, step that the new group went on from) of each group but the first."""
    found, last = [], 0
    for line in (job / "progress.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "going on from step_" in record.get("text", ""):
            begins = int(record["text"].rpartition("_")[2])
            found.append((last - begins, begins))
        last = record["step"] if "loss" in record else last
    return found
