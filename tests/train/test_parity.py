"""Masks, weights and moments do not depend on the number of ranks, bit for bit."""

import pytest
import torch

from tests.ranks import spawn
from tests.train.steps import run

SPARSE = {"target": 0.75}


def same(a: dict, b: dict) -> list[str]:
    """Keys of tensors (and digests) that differ."""
    keys = [key for key in a if isinstance(a[key], torch.Tensor)]
    assert keys
    assert keys == [key for key in b if isinstance(b[key], torch.Tensor)]
    return [key for key in keys if not torch.equal(a[key], b[key])] + (["digest"] if a.get("digest") != b.get("digest") else [])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return spawn(run, 1, str(tmp_path_factory.mktemp("alone")), {"run": {"seed": 3, "parity": True}}, SPARSE)[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_bit_equal_at_any_world_size(alone, tmp_path, ranks):
    other = spawn(run, ranks, str(tmp_path), {"run": {"seed": 3, "parity": True}}, SPARSE)
    assert same(alone, other[0]) == []
    assert alone["state"]["losses"]["train"] == other[0]["state"]["losses"]["train"]


def test_clipping_bites_and_dead_entries_are_zero(alone):
    dead = {key: ~_unpacked(alone, key) for key in alone if key.startswith("mask/")}
    assert dead
    for key, mask in dead.items():
        name = key.removeprefix("mask/")
        for what in ("model", "exp_avg", "exp_avg_sq"):
            assert not alone[f"{what}/{name}"][mask].any()
            assert alone[f"{what}/{name}"][~mask].ne(0).all()


def _unpacked(result, key):
    from raysparse.sparsity.topology import unpack

    return unpack(result[key], result[key.replace("mask/", "model/")].shape[1])
