import numpy as np
import pytest

from raysparse.data.order import permute, shuffled, spread


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
@pytest.mark.parametrize("seed", [0, -1, 2**63])
def test_permute_sends_every_place_to_another(size, seed):
    places = np.arange(size)
    for epoch in (0, 1):
        assert sorted(permute(places, np.full(size, epoch), size, seed)) == list(range(size))


def test_permute_depends_on_the_seed_and_the_epoch():
    places, zeros = np.arange(100), np.zeros(100, dtype=np.int64)
    orders = [permute(places, zeros + epoch, 100, seed).tolist() for epoch in (0, 1) for seed in (0, 1, 2**32, 2**32 + 1)]
    orders.append(places.tolist())
    assert len({tuple(order) for order in orders}) == 9


@pytest.mark.parametrize("size", [3, 8, 50])
def test_permute_favours_no_place(size):
    """Over 4,000 epochs each of `size` values stands at place 0 about 4,000 / size times; six standard deviations are allowed."""
    epochs = np.arange(4000)
    counts = np.bincount(permute(np.zeros(4000, dtype=np.int64), epochs, size, 7), minlength=size)
    assert np.abs(counts - 4000 / size).max() < 6 * np.sqrt(4000 / size)


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(10_000), np.zeros(10_000, dtype=np.int64), 10_000, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_shuffled_counts_samples_over_steps_rows_and_epochs():
    #  10 samples, 4 rows a step: steps 0..4 are the 20 samples of epochs 0 and 1; step 2 straddles them
    numbers = np.concatenate([shuffled(step, range(4), 4, 10, seed=3) for step in range(5)])
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist()
    assert shuffled(2, [3, 1], 4, 10, seed=3).tolist() == [numbers[11], numbers[9]]


def test_spread_is_even_and_holds_each_once():
    assert spread(range(4), 4, 10).tolist() == [0, 2, 5, 7]
    assert spread([3, 0], 4, 10).tolist() == [7, 0]
    assert spread(range(10), 10, 10).tolist() == list(range(10))
