"""Whose rows of the batch are whose, and when replicas lie badly."""

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.recipes.training import check_sizes
from raysparse.train.placement import largest_share, scattered, share_of, show_shares
from raysparse.train.shard import ShardingConfig
from tests.ranks import spawn
from tests.train.steps import SPARSE, config, differences, run

UNEVEN = {
    "training": {"length": 8, "sequences": 5, "micro": 2, "validate_every": 8, "validation_sequences": 5},
    "run": {"name": "uneven", "workers": [1, 4]},
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sequences", [5, 6, 12])
def test_shares_are_the_batch_in_its_order(sequences, world_size):
    shares = [share_of(sequences, rank, world_size) for rank in range(world_size)]
    assert [row for rows in shares for row in rows] == list(range(sequences))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, shares)) == largest_share(sequences, world_size)


def test_shares_in_words():
    assert show_shares(8, 3) == "3 workers share 8 sequences: 2 x 3 and 1 x 2"
    assert show_shares(8, 4) == "4 workers share 8 sequences: 2 each"
    assert show_shares(8, 1) == "1 worker shares 8 sequences: 8 each"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return spawn(run, 1, str(tmp_path_factory.mktemp("alone")), UNEVEN, SPARSE)[0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_uneven_split_trains_the_same_model(alone, tmp_path, ranks):
    """5 sequences: 3 and 2, two micro-batches and one; or 2, 2, 1; or 2, 1, 1, 1."""
    first, *others = spawn(run, ranks, str(tmp_path), UNEVEN, SPARSE)
    assert all(differences(first, other) == [] for other in others)
    assert first["digest"] == alone["digest"]
    assert first["state"]["tokens"] == alone["state"]["tokens"]
    torch.testing.assert_close(torch.tensor(first["history"]), torch.tensor(alone["history"]), rtol=1e-5, atol=0)
    for name in [key for key in alone if key.startswith("model/")]:
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-3)
    said = (tmp_path / "console.txt").read_text()
    assert f"{ranks} workers share 5 sequences: " in said


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"run": {"workers": [1, 6]}}, "Expected at least one sequence for each of at most 6 workers. Got training.sequences=5. "),
        ({"sharding": {"replicas": 2}}, "Got 2 replicas, 1 workers. Choose sharding.replicas=1, or one number of workers."),
        ({"run": {"workers": 4}}, "Expected run.workers to divide training.sequences. Got 4 workers, 5 sequences."),
    ],
    ids=["too many", "replicas", "one number"],
)
def test_numbers_of_workers_that_do_not_fit(sections, text):
    with pytest.raises(ConfigError) as error:
        check_sizes(config(**(UNEVEN | sections)))
    assert text in str(error.value)


@pytest.mark.parametrize("workers", [0, [2, 1], [0, 2], [1, 2, 3], [], "two", True, [1, 2.5]])
def test_what_is_no_number_of_workers(workers):
    with pytest.raises(ConfigError, match=r"run\.workers: Expected a number of at least 1, or \[least, most\] of such"):
        config(run={"workers": workers})


@pytest.mark.parametrize(
    ("replicas", "nodes", "text"),
    [
        (2, "aabb", None),
        (1, "abab", None),
        (4, "aabb", None),
        (2, "aaab", "1 of 2 replicas lie on several machines (3 on a, 1 on b)"),
        (2, "abab", "2 of 2 replicas lie on several machines (2 on a, 2 on b)"),
        (2, "aabbccdd", "let each hold a multiple of 4 workers"),
    ],
)
def test_replicas_lie_within_machines(replicas, nodes, text):
    said = scattered(ShardingConfig(replicas=replicas), nodes)
    assert said == text or text in str(said)
