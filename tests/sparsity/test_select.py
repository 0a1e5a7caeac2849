"""Exact top-k against a stable sort, on the inputs where radix selection could go wrong, over any number of ranks."""

import pytest
import torch

from raysparse.sparsity import counter
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.select import top_masks
from tests.ranks import spawn
from tests.threads import together

TOP = 2**31 - 1


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def oracle(keys, count):
    """Sort by descending key, ties by ascending index, and take the first `count`."""
    order = sorted(range(len(keys)), key=lambda i: -int(keys[i]))  # sorted is stable
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


@pytest.mark.parametrize(
    ("keys", "count", "chosen"),
    [
        ([3, 1, 3, 2], 0, [0, 0, 0, 0]),
        ([3, 1, 3, 2], 1, [1, 0, 0, 0]),
        ([3, 1, 3, 2], 2, [1, 0, 1, 0]),
        ([3, 1, 3, 2], 3, [1, 0, 1, 1]),
        ([3, 1, 3, 2], 4, [1, 1, 1, 1]),
        ([5, 5, 5, 5], 2, [1, 1, 0, 0]),
        ([0, 0, 0, 0], 3, [1, 1, 1, 0]),  # the lowest key there is
        ([TOP, 0, TOP, TOP], 2, [1, 0, 1, 0]),  # the highest
        ([1 << 20, (1 << 20) - 1, 1 << 20], 1, [1, 0, 0]),  # differ in the first digit
        ([1 << 10, (1 << 10) - 1, 1 << 10], 1, [1, 0, 0]),  # in the second
        ([6, 7, 6, 7], 3, [1, 1, 0, 1]),  # in the third
        ([9], 1, [1]),
        ([], 0, []),
    ],
)
def test_drawn(keys, count, chosen):
    assert top_masks([int32(keys)], [count], ALONE)[0].int().tolist() == chosen


def adversaries():
    generator = torch.Generator().manual_seed(0)
    n = 97

    def random(low, high):
        return torch.randint(low, high, (n,), generator=generator, dtype=torch.int32)

    return {
        "all equal": torch.full((n,), 12345, dtype=torch.int32),
        "all zero": torch.zeros(n, dtype=torch.int32),
        "all highest": torch.full((n,), TOP, dtype=torch.int32),
        "two keys": random(0, 2) * TOP,
        "few keys": random(0, 4) << 9,
        "one high digit": random(0, 1 << 10) | (77 << 20),
        "one low digit": (random(0, 1 << 11) << 20) | 77,
        "rising": torch.arange(n, dtype=torch.int32) * 22_000_000,
        "falling": torch.arange(n, dtype=torch.int32).flip(0) * 22_000_000,
        "around a digit": (1 << 20) + random(-3, 3),
        "random": random(0, TOP),
    }


PARTS = {
    1: [[97]],
    2: [[48, 49], [0, 97], [97, 0]],
    3: [[33, 32, 32], [0, 97, 0], [96, 0, 1]],
    5: [[20, 20, 20, 20, 17], [0, 0, 97, 0, 0], [1, 0, 95, 0, 1]],
}


@pytest.mark.parametrize("name", adversaries())
@pytest.mark.parametrize(("world_size", "sizes"), [(ranks, sizes) for ranks, splits in PARTS.items() for sizes in splits])
def test_equals_a_stable_sort_at_any_split(name, world_size, sizes):
    keys = adversaries()[name]
    for count in (0, 1, 2, 48, 49, 95, 96, 97):
        parts = together(lambda part, ranks, count=count: top_masks([part], [count], ranks)[0], keys.split(sizes))
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts), oracle(keys, count)), (name, count)


@pytest.mark.parametrize("name", adversaries())
def test_minus_one_is_never_chosen(name):
    """Not even where only the lowest keys are left; and it takes no place from them."""
    keys = adversaries()[name]
    barred = torch.arange(97) % 3 > 0
    eligible = keys[~barred]
    for sizes in ([97], [48, 49], [2, 94, 1]):
        for count in (0, 1, 20, 32, 33):
            parts = keys.where(~barred, -1).split(sizes)
            found = torch.cat(together(lambda part, ranks, count=count: top_masks([part], [count], ranks)[0], parts))
            assert not found[barred].any()
            assert torch.equal(found[~barred], oracle(eligible, count))
    with pytest.raises(AssertionError, match="34 of 33 elements of tensor 0"):
        top_masks([keys.where(~barred, -1)], [34], ALONE)


@pytest.mark.parametrize("world_size", [1, 3])
def test_several_tensors_at_once_equal_one_by_one(world_size):
    keys = [*adversaries().values(), int32([]), int32([4])]
    counts = [(17 * i) % 98 for i in range(len(keys) - 2)] + [0, 1]
    parts = [[tensor.tensor_split(world_size)[rank] for tensor in keys] for rank in range(world_size)]
    found = together(lambda part, ranks: top_masks(part, counts, ranks), parts)
    for i, (tensor, count) in enumerate(zip(keys, counts, strict=True)):
        assert torch.equal(torch.cat([masks[i] for masks in found]), oracle(tensor, count))
        alone = top_masks([tensor], [count], ALONE)[0]
        assert torch.equal(torch.cat([masks[i] for masks in found]), alone)


def test_no_tensors():
    assert top_masks([], [], ALONE) == []


@pytest.mark.parametrize("count", [-1, 5])
def test_impossible_counts_are_our_own_bug(count):
    with pytest.raises(AssertionError, match=f"{count} of 4 elements of tensor 1"):
        top_masks([int32([1]), int32([1, 2, 3, 4])], [1, count], ALONE)


def choose_here(keys, counts):
    """On a gloo rank: its part of each tensor, chosen over the process group."""
    import torch.distributed as dist

    from raysparse.train.process import ranks_of

    rank, size = dist.get_rank(), dist.get_world_size()
    mine = [torch.tensor(part, dtype=torch.int32).tensor_split(size)[rank] for part in keys]
    group = dist.group.WORLD
    assert group is not None
    return [mask.tolist() for mask in top_masks(mine, counts, ranks_of(group, torch.device("cpu")))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gloo_ranks(world_size):
    keys = [*adversaries().values(), int32([8]), int32([8, 8])]  # the last two leave ranks empty
    counts = [(29 * i) % 98 for i in range(len(keys) - 2)] + [1, 1]
    found = spawn(choose_here, world_size, [tensor.tolist() for tensor in keys], counts)
    for i, (tensor, count) in enumerate(zip(keys, counts, strict=True)):
        assert [bit for masks in found for bit in masks[i]] == oracle(tensor, count).tolist()


def test_more_elements_than_float32_can_count():
    """2^24 + 5 elements: a count or an index in float32 would be off by some."""
    n = (1 << 24) + 5
    tied = torch.zeros(n, dtype=torch.int32)
    (mask,) = top_masks([tied], [n - 2], ALONE)
    assert int(mask.sum()) == n - 2
    assert bool(mask[: n - 2].all())
    keys = counter.random_keys(0, n, 5)
    count = (1 << 24) + 1
    (mask,) = top_masks([keys], [count], ALONE)
    assert int(mask.sum()) == count
    assert int(keys[mask].min()) >= int(keys[~mask].max())
