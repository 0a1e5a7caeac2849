"""Runs that train few parameters: the same however they are spread, resumed or stopped, and small."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raysparse.kernels import library
from raysparse.kernels.adamw import MOMENTS
from raysparse.models.adapters import is_factor
from raysparse.sparsity.flops import forward_flops
from raysparse.train import checkpoint, loop
from raysparse.train.checkpoint import committed
from raysparse.train.optimizer import moments
from raysparse.train.state import Training
from tests.ranks import spawn
from tests.train.steps import CONTEXT, SPARSE, assemble, dead, differences, run, snapshot

STEPS = 8
MASKED = {"type": "mask_lora", "rank": 4, "alpha": 8}
SCALED = {"type": "scale_lora", "rank": 4, "alpha": 8, "train": []}
NORMS = {"type": "selective"}
WITH_HEAD = {"type": "selective", "train": ["bias", "norm", "head"]}
ALL = {"masked": MASKED, "scaled": SCALED, "norms": NORMS, "head": WITH_HEAD}
KINDS = {
    "none": {"type": "none"},
    "fsdp2": {"type": "fsdp2"},
    "packed": {"type": "fsdp2", "packed": "on"},
    "keep gathered": {"type": "fsdp2", "reshard_after_forward": False},
    "replicas": {"type": "fsdp2", "replicas": 2},
}


def sections(adapters: dict, kind: str = "fsdp2", micro: int = 2, **more: Any) -> dict:
    """8 steps of 6 sequences, in micro-batches; AdamW's steps are larger than a weight's rounding errors."""
    training = {"length": STEPS, "sequences": 6, "micro": micro, "validate_every": 4, "validation_sequences": 5}
    return {"adapters": adapters, "training": training, "sharding": KINDS[kind], "checkpoint": {"every": 4, "keep": 9}} | more


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """Each kind of adapters on one rank."""
    return {name: spawn(run, 1, str(tmp_path_factory.mktemp(name)), sections(adapters), SPARSE)[0] for name, adapters in ALL.items()}


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> dict:
    return spawn(start, 1, str(tmp_path_factory.mktemp("before")))[0]


def start(folder: str) -> dict:
    return snapshot(assemble(folder, sections(MASKED), SPARSE)[0])


def trains(name: str, adapters: dict) -> bool:
    named = adapters.get("train", ["bias", "norm"])
    is_norm = ".ln_" in name and "norm" in named
    return is_factor(name) or (name.endswith("bias") and "bias" in named) or is_norm or ("wte" in name and "head" in named)


@pytest.mark.parametrize("name", ALL)
def test_what_is_frozen_keeps_its_bits_and_the_rest_trains(alone, before, name):
    result = alone[name]
    weights = {key.removeprefix("model/"): value for key, value in result.items() if key.startswith("model/")}
    assert any(is_factor(weight) for weight in weights) == (name in ("masked", "scaled"))
    for weight, value in weights.items():
        start = before[f"model/{weight}"]
        assert torch.equal(value, start) != trains(weight, ALL[name]), weight
        for which in MOMENTS:
            assert (f"{which}/{weight}" in result) == trains(weight, ALL[name])
    assert result["digest"] == before["digest"]
    losses = [loss for _, loss, _ in result["history"]]
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(
    ("name", "kind", "ranks", "micro"),
    [
        ("masked", "none", 2, 1),
        ("masked", "fsdp2", 3, 2),
        ("masked", "packed", 2, 1),
        ("masked", "keep gathered", 2, 3),
        ("masked", "replicas", 2, 2),
        ("scaled", "fsdp2", 2, 1),
        ("scaled", "none", 3, 2),
        ("norms", "fsdp2", 2, 1),
        ("norms", "none", 2, 1),
        ("head", "packed", 2, 2),
    ],
)
def test_every_kind_trains_the_same_model(alone, tmp_path, name, kind, ranks, micro):
    expected = alone[name]
    for other in spawn(run, ranks, str(tmp_path), sections(ALL[name], kind, micro), SPARSE):
        assert (other["digest"], other["nnz"]) == (expected["digest"], expected["nnz"])
        torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(expected["history"]), rtol=1e-4, atol=0)
        for weight, mask in dead(other).items():
            assert torch.equal(other[f"mask/{weight}"], expected[f"mask/{weight}"])
            assert not other[f"model/{weight}"][mask].any()
        for key, value in expected.items():
            if key.startswith("model/"):
                torch.testing.assert_close(other[key], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["masked", "scaled", "norms"])
def test_parity_is_bit_equal_at_any_number_of_ranks(tmp_path, name):
    parity = sections(ALL[name], run={"name": "steps", "seed": 3, "parity": True})
    one = spawn(run, 1, str(tmp_path / "1"), parity, SPARSE)[0]
    for other in spawn(run, 3, str(tmp_path / "3"), parity, SPARSE):
        assert differences(one, other) == []


@pytest.mark.parametrize("kind", ["fsdp2", "none"])
def test_killed_and_resumed_is_bit_equal_to_straight_on(tmp_path, kind):
    settings = sections(MASKED, kind)
    straight = spawn(run, 2, str(tmp_path / "straight"), settings, SPARSE)
    assert spawn(run, 2, str(tmp_path / "resumed"), settings, SPARSE, 7)[0]["state"]["step"] == 6
    for a, b in zip(straight, spawn(run, 2, str(tmp_path / "resumed"), settings, SPARSE), strict=True):
        assert differences(a, b) == []
    assert "going on from step_00000004" in (tmp_path / "resumed" / "console.txt").read_text()


@pytest.mark.parametrize("state", ["live", "dense"])
def test_resumed_on_other_ranks_with_parity(tmp_path, state):
    parity = sections(MASKED, run={"name": "steps", "seed": 3, "parity": True}) | {"optimizer": {"state": state}}
    straight = spawn(run, 1, str(tmp_path / "straight"), parity, SPARSE)[0]
    spawn(run, 2, str(tmp_path / "resumed"), parity, SPARSE, 7)
    for other in spawn(run, 3, str(tmp_path / "resumed"), parity, SPARSE):
        assert differences(straight, other) == []


def test_a_checkpoint_is_of_one_kind_of_adapters(tmp_path):
    spawn(run, 1, str(tmp_path), sections(MASKED), SPARSE)
    with pytest.raises(AssertionError, match=r"Expected .*step_00000008 to be a checkpoint of this model. Got .* tensors that differ"):
        spawn(run, 1, str(tmp_path), sections(MASKED | {"rank": 2}), SPARSE)
    with pytest.raises(AssertionError, match=r"exp_avg/transformer.wte.weight missing instead of \(101, 40\)"):
        spawn(run, 1, str(tmp_path), {k: v for k, v in sections(MASKED).items() if k != "adapters"}, SPARSE)


def sizes(folder: str, adapters: dict, kind: str) -> dict[str, Any]:
    """After two steps."""
    t, _ = assemble(folder, sections(adapters, kind), SPARSE)
    for step in range(2):
        loop.forward_backward(t, step)
        loop.update(t, step)
        loop._count(t, step, 6 * CONTEXT, 0)
    parts = t.sharded.parts
    return t.memory() | {
        "trained": sum(part.local.nbytes for part in parts.values() if part.trained),
        "model": sum(part.local.nbytes for name, part in parts.items() if not is_factor(name)),
        "owners": sorted(moments(t.sharded, t.optimizer, "exp_avg")),
        "whole_gradients": [name for name, p in t.sharded.module.named_parameters() if p.grad is not None],
        "shapes": {name: part.shape for name, part in parts.items()},
        "ledger": t.ledger.to_dict(),
        "nnz": dict(t.nnz),
        "arch": t.arch,
    }


@pytest.mark.parametrize("kind", ["fsdp2", "none"])
def test_only_what_trains_has_moments(tmp_path, kind):
    for found in spawn(sizes, 2, str(tmp_path), MASKED, kind):
        assert found["gradients"] == found["trained"]
        assert found["moments"] == 2 * found["trained"]
        assert found["dense_moments"] == 2 * found["model"]
        assert found["owners"] == sorted(name for name in found["shapes"] if trains(name, MASKED))
        assert found["whole_gradients"] == []


def test_a_checkpoint_has_moments_of_what_trains(alone, tmp_path):
    spawn(run, 2, str(tmp_path), sections(MASKED), SPARSE)
    path = committed(tmp_path / "checkpoints")[-1]
    stored = checkpoint.stored_shapes(path)
    owners = {key.split("/")[1] for key in stored if key.startswith("exp_avg/")}
    weights = checkpoint.read_weights(path)
    assert owners == {name for name in weights if trains(name, MASKED)}
    assert weights.keys() == {key.removeprefix("model/") for key in alone["masked"] if key.startswith("model/")}


def test_what_is_not_multiplied_is_not_counted(tmp_path):
    """Two steps: forward, gradient of the input, gradient of the weight; the last of them is left out of what nobody trains."""
    found = {name: spawn(sizes, 1, str(tmp_path / name), adapters, "none")[0] for name, adapters in ALL.items()}
    arch, nnz, sequences = found["norms"]["arch"], found["norms"]["nnz"], 2 * 6
    sparse, dense = (forward_flops(arch, live, CONTEXT, "spdf") for live in (nnz, {}))
    for name, linears, head in (("masked", 3, 2), ("scaled", 3, 2), ("norms", 2, 2), ("head", 2, 3)):
        ledger = found[name]["ledger"]
        for part, forward in (("counted", sparse), ("executed", dense)):
            assert ledger[part]["linears"] == pytest.approx(linears * forward.linears * sequences), (name, part)
            assert ledger[part]["head"] == pytest.approx(head * forward.head * sequences)
            assert ledger[part]["attention"] == pytest.approx(3 * forward.attention * sequences)
        assert ledger["dense"]["linears"] == pytest.approx(3 * dense.linears * sequences)


@pytest.mark.skipif(library.why_not() is not None, reason="no native library")
def test_frozen_layers_without_factors_run_on_sparse_kernels(alone, tmp_path):
    settings = sections(NORMS) | {"kernels": "sparse"}
    other = spawn(run, 2, str(tmp_path), settings, SPARSE)[0]
    torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(alone["norms"]["history"]), rtol=1e-4, atol=0)
    assert "kernels: layers that skip zeros: forward 8 of 8" in (tmp_path / "console.txt").read_text()


@pytest.mark.parametrize("kind", ["fsdp2", "none"])
def test_bfloat16_is_close(alone, tmp_path, kind):
    settings = sections(MASKED, kind, run={"name": "steps", "seed": 3, "precision": "bfloat16"})
    other = spawn(run, 2, str(tmp_path), settings, SPARSE)[0]
    losses = [torch.tensor([loss for _, loss, _ in result["history"]]) for result in (other, alone["masked"])]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    assert other["digest"] == alone["masked"]["digest"]


def test_activation_checkpointing_changes_nothing(alone, tmp_path):
    settings = sections(MASKED)
    settings["training"] |= {"activation_checkpointing": True}
    assert differences(alone["masked"], spawn(run, 1, str(tmp_path), settings, SPARSE)[0]) == []


def test_clipping_sees_what_trains_alone(tmp_path):
    (found,) = spawn(norms, 1, str(tmp_path))
    norm, expected, after, limit = found
    assert norm == pytest.approx(expected, rel=1e-5)
    assert after == pytest.approx(limit, rel=1e-3)
    assert limit < norm


def norms(folder: str) -> tuple[float, float, float, float]:
    """(the norm that the loop found, the one of the trained gradients by torch, the one that AdamW saw, the limit)."""
    t, _ = assemble(folder, sections(MASKED), SPARSE)
    loop.forward_backward(t, 0)
    parts = [part.local for part in t.sharded.parts.values() if part.trained]

    def total() -> float:
        return math.sqrt(sum(float(part.grad.double().square().sum()) for part in parts if part.grad is not None))

    before, seen = total(), []
    t.optimizer.register_step_pre_hook(lambda *_: seen.append(total()))
    norm, _, _ = loop.update(t, 0)
    return norm, before, seen[0], t.clip_norm


def stopped_early(folder: str) -> tuple[dict, dict, dict]:
    """(at the best step, at the last one, at the end) with validation losses that are best at step 2."""
    settings = sections(MASKED)
    settings["training"] |= {"validate_every": 2, "patience": 2}
    t, state = assemble(folder, settings | {"checkpoint": {"every": 0, "keep": 1}}, SPARSE)
    losses, at = {2: 3.0, 4: 3.5, 6: 3.2}, {}

    def validate(t: Training) -> tuple[float, float]:
        at[state.step] = snapshot(t)
        return losses[state.step], 0.1

    loop.validate = validate
    state = loop.train(t, state)
    return at[2], at[6], snapshot(t)


def test_early_stopping_goes_back_to_the_best_factors(tmp_path):
    for best, last, end in spawn(stopped_early, 2, str(tmp_path)):
        assert differences(best, end) == []
        assert any(is_factor(key) for key in differences(last, end))


def test_the_console_tells_what_trains(alone, tmp_path):
    spawn(run, 1, str(tmp_path / "run"), sections(NORMS), SPARSE)
    trained = sum(value.numel() for key, value in alone["norms"].items() if key.startswith("exp_avg/"))
    total = sum(value.numel() for key, value in alone["norms"].items() if key.startswith("model/"))
    text = f"run: selective trains {trained:,} parameters, {trained / total:.2%} of the model's {total:,}"
    assert text in Path(tmp_path / "run" / "console.txt").read_text()
