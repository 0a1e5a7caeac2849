"""Training through int8 weights: the same however it is spread, masks as they were."""

from typing import Any

import pytest
import torch

from tests.ranks import spawn
from tests.train.steps import ENCODER_DECODERS, SPARSE, dead, differences, run

STEPS = 8
KINDS = {"none": {"type": "none"}, "fsdp2": {"type": "fsdp2"}, "packed": {"type": "fsdp2", "packed": "on"}}


def sections(quantization: str = "int8", kind: str = "fsdp2", parity: bool = False, **more: Any) -> dict:
    training = {"length": STEPS, "sequences": 6, "micro": 2, "validate_every": 4, "validation_sequences": 5}
    settings = {"run": {"name": "steps", "seed": 3, "parity": parity}, "training": training, "sharding": KINDS[kind]}
    return settings | {"quantization": quantization, "checkpoint": {"every": 4, "keep": 9}} | more


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """Each kind on one rank."""
    kinds = ("none", "int8", "int8_weight_only")
    return {kind: spawn(run, 1, str(tmp_path_factory.mktemp(kind)), sections(kind), SPARSE)[0] for kind in kinds}


def losses(result: dict) -> torch.Tensor:
    return torch.tensor([loss for _, loss, _ in result["history"]])


def test_it_is_another_training_close_to_that_of_floats(alone):
    for kind in ("int8", "int8_weight_only"):
        assert differences(alone["none"], alone[kind])
        torch.testing.assert_close(losses(alone[kind]), losses(alone["none"]), rtol=1e-2, atol=0)
        assert alone[kind]["digest"] == alone["none"]["digest"]
        for name, mask in dead(alone[kind]).items():
            assert not alone[kind][f"model/{name}"][mask].any()
            assert alone[kind][f"model/{name}"][~mask].all()


@pytest.mark.parametrize(("kind", "ranks"), [("none", 2), ("fsdp2", 3), ("packed", 2)])
def test_every_kind_of_sharding_trains_the_same_model(alone, tmp_path, kind, ranks):
    """A gradient that is summed in another order moves a weight over a rounding edge: 1/255 of its row's largest."""
    for other in spawn(run, ranks, str(tmp_path), sections("int8", kind), SPARSE):
        torch.testing.assert_close(losses(other), losses(alone["int8"]), rtol=1e-3, atol=0)
        assert other["digest"] == alone["int8"]["digest"]


@pytest.mark.parametrize("model", ["gpt", *ENCODER_DECODERS])
def test_parity_is_bit_equal_at_any_number_of_ranks(tmp_path, model):
    more = {} if model == "gpt" else {"model": ENCODER_DECODERS[model]}
    one = spawn(run, 1, str(tmp_path / "1"), sections(parity=True, **more), SPARSE)[0]
    for other in spawn(run, 2, str(tmp_path / "2"), sections(parity=True, **more), SPARSE):
        assert differences(one, other) == []


def test_killed_and_resumed_is_bit_equal_to_straight_on(tmp_path):
    straight = spawn(run, 2, str(tmp_path / "straight"), sections(), SPARSE)
    assert spawn(run, 2, str(tmp_path / "resumed"), sections(), SPARSE, 7)[0]["state"]["step"] == 6
    for a, b in zip(straight, spawn(run, 2, str(tmp_path / "resumed"), sections(), SPARSE), strict=True):
        assert differences(a, b) == []


def test_activation_checkpointing_changes_nothing(alone, tmp_path):
    settings = sections()
    settings["training"] |= {"activation_checkpointing": True}
    assert differences(alone["int8"], spawn(run, 1, str(tmp_path), settings, SPARSE)[0]) == []


@pytest.mark.parametrize("kind", ["fsdp2", "none"])
def test_bfloat16_is_close(alone, tmp_path, kind):
    settings = sections(kind=kind)
    settings["run"] |= {"precision": "bfloat16"}
    other = spawn(run, 2, str(tmp_path), settings, SPARSE)[0]
    torch.testing.assert_close(losses(other), losses(alone["int8"]), rtol=1e-2, atol=0)
