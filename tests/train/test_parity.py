"""Masks, weights, moments, losses and norms do not depend on the number of ranks, bit for bit."""

import pytest
import torch

from tests.ranks import spawn
from tests.train.steps import CONTEXT, dead, differences, run, run_with_hash_seed

# Two micro-batches a step. Rows: 101, 16, 120, 40, and 2 in the feed-forward layers, fewer than 3 ranks.
SECTIONS = {
    "run": {"name": "parity", "seed": 3, "parity": True},
    "model": {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 2, "n_inner": 2, "vocab_size": 101}},
}
SPARSE = {"target": 0.75, "distribution": {"type": "er"}, "layers": {"*.0.mlp.c_fc.weight": 0.5}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return spawn(run, 1, str(tmp_path_factory.mktemp("alone")), SECTIONS, SPARSE)[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_world_size_is_bit_equal(alone, tmp_path, ranks):
    for other in spawn(run, ranks, str(tmp_path), SECTIONS, SPARSE):
        assert differences(alone, other) == []


def test_two_replicas_of_two_shards_are_bit_equal_to_one_rank(alone, tmp_path):
    for other in spawn(run, 4, str(tmp_path), SECTIONS | {"sharding": {"replicas": 2}}, SPARSE):
        assert differences(alone, other) == []


def test_bfloat16_computation_is_bit_equal(tmp_path):
    """bfloat16 in the matrix products; weights, moments and sums over ranks are float32."""
    half = SECTIONS | {"run": SECTIONS["run"] | {"precision": "bfloat16"}, "training": {"length": 8, "sequences": 6, "micro": 3}}
    (one,) = spawn(run, 1, str(tmp_path / "one"), half, SPARSE)
    assert differences(one, spawn(run, 2, str(tmp_path / "two"), half, SPARSE)[1]) == []


def test_what_was_compared_is_a_sparse_run_with_clipping(alone):
    assert [step for step, _, _ in alone["history"]] == list(range(1, 25))
    assert min(norm for _, _, norm in alone["history"]) > 2 * 0.05  # clip_norm
    assert alone["state"]["losses"]["train"] == alone["history"][-1][1]
    assert alone["state"]["tokens"] == 24 * 6 * CONTEXT
    assert alone["nnz"]["transformer.h.0.mlp.c_fc.weight"] == 40  # half of 2 x 40, its own level
    assert alone["nnz"]["transformer.h.1.mlp.c_fc.weight"] == 80  # ER leaves so thin a layer dense
    assert sum(mask.numel() for mask in dead(alone).values()) == 2 * (120 * 40 + 40 * 40 + 2 * 2 * 40)
    for name, mask in dead(alone).items():
        assert (~mask).sum() == alone["nnz"][name]
        for what in ("model", "exp_avg", "exp_avg_sq"):
            assert not alone[f"{what}/{name}"][mask].any()
            assert alone[f"{what}/{name}"][~mask].ne(0).all()


def test_batch_shared_out_over_two_ranks_differs_by_rounding_only(alone, tmp_path):
    even = SECTIONS | {"run": {"name": "even", "seed": 3}, "optimizer": {"clip_norm": 0.05, "lr": 1e-2, "implementation": "foreach"}}
    for other in spawn(run, 2, str(tmp_path), even, SPARSE):
        assert other["digest"] == alone["digest"]
        history, expected = torch.tensor(other["history"]), torch.tensor(alone["history"])
        torch.testing.assert_close(history, expected, rtol=1e-5, atol=0)


def test_hash_seed_of_a_process_changes_nothing(alone, tmp_path):
    """PYTHONHASHSEED orders sets and salts hash(); a rank that depends on it would differ from the others."""
    assert differences(alone, run_with_hash_seed(7, tmp_path, SECTIONS, SPARSE)) == []
