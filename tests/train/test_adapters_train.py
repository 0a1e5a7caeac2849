"""Adapters in training: sharded, resumed, with moments of what trains alone; the mask stays."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import main
from raysparse.models.adapters import AdaptersConfig, merge
from tests.ranks import spawn
from tests.train.steps import SPARSE, assemble, run

KINDS = ("selective", "mask_lora", "scale_lora")
TRAINING = {"length": 8, "sequences": 6, "micro": 2, "validate_every": 8, "validation_sequences": 5}


def sections(kind, **more):
    return {"training": TRAINING, "adapters": {"type": kind, "rank": 4}, "optimizer": {"lr": 1e-2}} | more


def weights_of(result):
    return {name.removeprefix("model/"): value for name, value in result.items() if name.startswith("model/")}


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_trains_the_same_and_keeps_the_mask(tmp_path, kind):
    alone = spawn(run, 1, str(tmp_path / "1"), sections(kind), SPARSE)[0]
    start = spawn(run, 1, str(tmp_path / "0"), sections(kind, optimizer={"lr": 1e-12}), SPARSE)[0]
    for sharding in ({"type": "fsdp2", "packed": "on"}, {"type": "none"}):
        for other in spawn(run, 2, str(tmp_path / sharding["type"]), sections(kind, sharding=sharding), SPARSE):
            assert other["digest"] == alone["digest"]
            for name, value in weights_of(alone).items():
                torch.testing.assert_close(other[f"model/{name}"], value, rtol=0, atol=1e-3)
    config = AdaptersConfig(type=kind, rank=4)
    before, after = (merge(weights_of(result), config) for result in (start, alone))
    for name in alone["nnz"]:
        if kind == "selective":
            assert torch.equal(after[name], before[name])
        else:
            assert ((after[name] != 0) <= (before[name] != 0)).all()
            assert not torch.equal(after[name], before[name])
    assert torch.equal(alone["model/transformer.wte.weight"], start["model/transformer.wte.weight"])  # frozen
    losses = [loss for _, loss, _ in alone["history"]]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_killed_and_resumed_is_bit_equal(tmp_path, kind):
    more = {"checkpoint": {"every": "3 steps"}}
    straight = spawn(run, 2, str(tmp_path / "straight"), sections(kind, **more), SPARSE)
    spawn(run, 2, str(tmp_path / "resumed"), sections(kind, **more), SPARSE, 5)
    for one, other in zip(straight, spawn(run, 2, str(tmp_path / "resumed"), sections(kind, **more), SPARSE), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one if isinstance(one[key], torch.Tensor))


def memory(folder, kind):
    return assemble(folder, sections(kind), SPARSE)[0].memory()


def test_only_what_trains_has_moments(tmp_path):
    ((all_weights,), (few,)) = (spawn(memory, 1, str(tmp_path / kind), kind) for kind in ("none", "mask_lora"))
    assert few["moments"] == 2 * few["gradients"] < 0.5 * all_weights["moments"]
    assert few["weights"] > all_weights["weights"]


@pytest.fixture
def finetune(tmp_path, pretrain_values):
    """A sparse model, and ``finetune(**sections)`` -> exit status."""
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(pretrain_values))
    assert main(["pretrain", str(tmp_path / "pretrain.yaml"), "--local"]) == 0
    pairs = [{"source": f"mask {i} layer", "target": f"live {i}"} for i in range(40)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = {
        "run": pretrain_values["run"] | {"name": "tuned"},
        "model": {"path": str(Path(pretrain_values["run"]["folder"]) / "tiny")},
        "task": {"type": "seq2seq", "data": {"type": "folder", "path": str(tmp_path)}, "metrics": ["chrf"]},
        "context": 16,
        "sparsity": {"masks": "keep"},
        "training": {"length": 6, "sequences": 4, "micro": 2, "validation_sequences": 8},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"max_examples": 4},
        "cache_dir": pretrain_values["data"]["cache_dir"],
    }

    def start(*words, **sections):
        (tmp_path / "tune.yaml").write_text(yaml.safe_dump(values | sections))
        return main(["finetune", str(tmp_path / "tune.yaml"), "--local", *words])

    return start


def test_a_run_exports_the_merged_model_with_its_zeros(finetune, pretrain_values, tmp_path, capsys):
    assert finetune("--json", adapters={"type": "mask_lora", "rank": 4}, optimizer={"lr": 1e-2}) == 0
    summary = json.loads(capsys.readouterr().out)
    runs = Path(pretrain_values["run"]["folder"])
    before, after = (load_file(str(runs / name / "export" / "model.safetensors")) for name in ("tiny", "tuned"))
    assert before.keys() == after.keys()
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(before[name] == 0, after[name] == 0)
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert (runs / "tuned" / "export" / "masks.safetensors").exists()
    assert 0 < summary["model"]["trained"] < summary["model"]["parameters"] == sum(value.numel() for value in after.values())
    assert main(["export", f"run={runs / 'tuned'}", f"to={tmp_path / 'again'}"]) == 0
    again = load_file(str(tmp_path / "again" / "model.safetensors"))
    assert all(torch.equal(again[key], after[key]) for key in after)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sparsity": {"masks": "lift"}}, "Expected sparsity.masks=keep with adapters.type=mask_lora. Got lift"),
        ({"kernels": "sparse"}, "Expected kernels=auto or dense with adapters.type=mask_lora. Got sparse"),
        ({"adapters": {"type": "mask_lora", "rank": 32}}, "Expected adapters.rank below 32"),
    ],
)
def test_what_does_not_combine_starts_nothing(finetune, capsys, sections, message):
    capsys.readouterr()
    assert finetune(**{"adapters": {"type": "mask_lora", "rank": 4}} | sections) == 2
    assert message in capsys.readouterr().err
