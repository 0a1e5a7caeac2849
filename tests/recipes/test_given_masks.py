"""Runs that start from masks of others, and from the zeros of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysparse.config import ConfigError, merge
from raysparse.kernels.bits import unpack
from raysparse.recipes import pretrain
from raysparse.recipes.masks import nnz_of_bits, read_masks
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console


@pytest.fixture
def train(pretrain_values, tmp_path):
    def run(name: str, **sections: Any) -> tuple[dict[str, Any], Path]:
        config = PretrainConfig.check(merge(pretrain_values, {"run": {"name": name}, **sections}))
        job = pretrain.open_run(config)
        with (tmp_path / f"{name}.txt").open("w") as stream:
            (summary,) = run_here([job], config.run, Console(stream))
        return summary, job.path

    return run


def digests(folder: Path) -> list[str]:
    return [json.loads(line)["digest"] for line in (folder / "topology.jsonl").read_text().splitlines()[1:]]


def test_a_run_starts_from_the_masks_of_another(train):
    first, folder = train("first", run={"name": "first", "seed": 11})
    by_name, _ = train("by-name", sparsity={"target": 0, "masks": "first"})
    by_file, _ = train("by-file", sparsity={"target": 0.75, "masks": str(folder / "export" / "masks.safetensors")})
    by_checkpoint, _ = train("by-checkpoint", sparsity={"target": 0, "masks": str(folder / "checkpoints" / "step_00000012")})
    own, _ = train("own")
    shared = {s["sparsity"]["mask_digest"] for s in (first, by_name, by_file, by_checkpoint)}
    assert len(shared) == 1
    assert own["sparsity"]["mask_digest"] not in shared
    assert by_name["sparsity"]["target"] == first["sparsity"]["actual"]
    assert by_name["loss"] == by_file["loss"] != first["loss"]


def test_an_evolving_run_starts_from_shared_masks_and_keeps_their_plan(train):
    _, folder = train("first", sparsity={"layers": {"*.0.mlp.c_fc.weight": 0.5}})
    evolving, other = train("rigl", sparsity={"target": 0, "masks": "first", "evolution": {"type": "rigl", "update_interval": 3}})
    assert digests(other)[0] == digests(folder)[0]
    assert len(set(digests(other))) == 3  # updates in steps 3 and 6, of 12 with a stop at 75 %
    live = [json.loads(line)["nnz"] for line in (other / "topology.jsonl").read_text().splitlines()[1:]]
    assert live[0] == live[-1] == json.loads((folder / "topology.jsonl").read_text().splitlines()[1])["nnz"]
    assert evolving["topology"]["updates"] == 2


def test_the_zeros_of_a_checkpoint_stay_zero(train, tmp_path):
    _, folder = train("first")
    model = tmp_path / "pruned"
    model.mkdir()
    for file in (folder / "export").iterdir():
        if file.name != "masks.safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name][:3] = 0.0  # [in, out] on disk: three columns of the layer in training
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    pruned, other = train(
        "zeros", model={"path": str(model), "preset": None, "overrides": {}}, sparsity={"target": 0, "evolution": {"type": "zeros"}}
    )
    trained = load_file(other / "export" / "model.safetensors")
    assert torch.equal(trained[name] == 0, weights[name] == 0)
    assert not torch.equal(trained[name], weights[name])
    assert pruned["sparsity"]["nnz"] == sum(int((weights[key["name"]] != 0).sum()) for key in pruned["sparsity"]["layers"])


def test_masks_of_every_version_are_those_that_the_run_reports(train):
    summary, folder = train("set", sparsity={"evolution": {"type": "set", "update_interval": 2}})
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    history = [json.loads(line) for line in (folder / "topology.jsonl").read_text().splitlines()[2:]]
    for tag in ("churn", "explored", "drop_fraction", "version"):
        points = [(event.step - 1, event.value) for event in board.Scalars(f"topology/{tag}")]
        assert points == [(record["step"], pytest.approx(record[tag], rel=1e-6)) for record in history]
    told = {name: board.Scalars(f"memory/{name}") for name in (*summary["memory_bytes"], "peak")}
    for name, most in summary["memory_bytes"].items():
        assert max(event.value for event in told[name]) == most
    assert told["moments"][-1].value < told["dense_moments"][-1].value
    assert all(event.value > 0 for event in told["peak"])
    for name in ("bytes_per_step", "dense_bytes_per_step", "seconds_per_step"):
        assert board.Scalars(f"wire/{name}")
    kept = (folder / "checkpoints" / "step_00000012" / "topology.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in kept[1:]] == list(range(6))
    masks = read_masks(str(folder), folder.parent)
    layers = {layer["name"]: layer["nnz"] for layer in summary["sparsity"]["layers"]}
    assert nnz_of_bits(masks) == layers
    weights = load_file(folder / "export" / "model.safetensors")
    for name, bits in masks.items():
        live = unpack(bits, weights[name].T.shape[1])
        assert not weights[name].T[~live].any()


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"target": 0.75, "evolution": {"type": "zeros"}}, "Expected model.path for evolution zeros"),
        ({"target": 0.5, "masks": "first"}, r"Expected masks of sparsity 0\.5 in first\. Got 0\.7500"),
        ({"target": 0, "masks": "first", "exclude": ["*c_fc*"]}, r"Expected masks of the 6 sparse weights in first\. Got 2 that differ"),
        (
            {"target": 0, "masks": "first", "evolution": {"type": "set"}, "timeline": [{"sparsity": {"type": "polynomial"}}]},
            "Expected a constant sparsity where the masks are given",
        ),
        (
            {"target": 0, "masks": "first", "pattern": {"type": "block", "size": 16}},
            "Expected masks of the pattern .*'block'.* Got others in 8",
        ),
        (
            {"target": 0, "masks": "first", "pattern": {"type": "n:m", "n": 2, "m": 4}},
            "Expected masks of the pattern .*'n:m'.* Got others in 8",
        ),
        ({"target": 0, "masks": "nobody"}, "nobody"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_starts(train, pretrain_values, sparsity, message):
    train("first")
    config = PretrainConfig.check(merge(pretrain_values, {"run": {"name": "second"}, "sparsity": sparsity}))
    with pytest.raises(ConfigError, match=message):
        pretrain.open_run(config)
    assert not config.run.path.exists()


def test_a_run_goes_on_with_its_own_copy_whatever_became_of_the_source(train, pretrain_values):
    _, folder = train("first")
    masks = load_file(folder.parent / "first" / "export" / "masks.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    masks[name] = masks[name].flip(0)
    moved = folder.parent / "moved.safetensors"
    save_file(masks, moved)
    values = merge(pretrain_values, {"run": {"name": "third"}, "sparsity": {"target": 0, "masks": str(moved)}})
    job = pretrain.open_run(PretrainConfig.check(values))
    kept = load_file(job.path / "first_masks.safetensors")
    assert torch.equal(kept[name], masks[name])
    moved.unlink()
    again = pretrain.open_run(PretrainConfig.check(values))  # it goes on with its own copy
    assert torch.equal(load_file(again.path / "first_masks.safetensors")[name], kept[name])
