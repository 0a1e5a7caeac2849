"""Exact top-k against a stable sort, on the inputs where radix selection could go wrong, over any number of ranks."""

import pytest
import torch

from raysparse.kernels import library
from raysparse.sparsity import counter, select
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.select import NONE, guess, top_masks
from tests.ranks import spawn
from tests.threads import together

TOP = 2**31 - 1
needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")


@pytest.fixture(autouse=True, params=[pytest.param("native", marks=needs_native), "torch"])
def way(request, monkeypatch):
    """Every test in both ways, which must not differ in a bit."""
    if request.param == "torch":
        monkeypatch.setattr(library, "available", lambda: False)
    return request.param


def top(keys, counts, ranks=ALONE, among=None, piece=40):
    """`top_masks` of keys that are at hand; -1 is not eligible."""
    return top_masks(lambda i: keys[i].split(piece), [tensor >= 0 for tensor in keys], counts, ranks, among)


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
    assert top([int32(keys)], [count])[0].int().tolist() == chosen


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
        parts = together(lambda part, ranks, count=count: top([part], [count], ranks)[0], keys.split(sizes))
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
            found = torch.cat(together(lambda part, ranks, count=count: top([part], [count], ranks)[0], parts))
            assert not found[barred].any()
            assert torch.equal(found[~barred], oracle(eligible, count))
    with pytest.raises(AssertionError, match="34 of 33 elements of tensor 0"):
        top([keys.where(~barred, -1)], [34])


@pytest.mark.parametrize("world_size", [1, 3])
def test_several_tensors_at_once_equal_one_by_one(world_size):
    keys = [*adversaries().values(), int32([]), int32([4])]
    counts = [(17 * i) % 98 for i in range(len(keys) - 2)] + [0, 1]
    parts = [[tensor.tensor_split(world_size)[rank] for tensor in keys] for rank in range(world_size)]
    found = together(lambda part, ranks: top(part, counts, ranks), parts)
    for i, (tensor, count) in enumerate(zip(keys, counts, strict=True)):
        assert torch.equal(torch.cat([masks[i] for masks in found]), oracle(tensor, count))
        alone = top([tensor], [count])[0]
        assert torch.equal(torch.cat([masks[i] for masks in found]), alone)


@pytest.mark.parametrize("name", adversaries())
def test_the_sign_bit_does_not_count(name):
    """So that floats are keys by their absolute values."""
    keys = adversaries()[name]
    signed = keys | (torch.arange(97, dtype=torch.int32) % 2 << 31)
    assert int((signed < 0).sum()) == 48
    eligible = torch.arange(97) % 5 > 0
    expected = top([keys.where(eligible, -1)], [40])[0]
    assert torch.equal(top_masks(lambda i: [signed], [eligible], [40], ALONE)[0], expected)


def random_parts(sizes, barred=0.3):
    """Random keys of several tensors, some not eligible; [rank][tensor]."""
    generator = torch.Generator().manual_seed(1)
    keys = []
    for i, size in enumerate(sizes):
        drawn = counter.random_keys(7, size, counter.key("guess", i))
        keys.append(drawn.where(torch.rand(size, generator=generator) >= barred, -1))
    return keys


@pytest.mark.parametrize("world_size", [1, 3])
def test_guessing_finds_the_same_in_one_pass(world_size):
    keys = random_parts([0, 1, 2, 70, 1001, 5000, 5000, 5000])
    among = [int((tensor >= 0).sum()) for tensor in keys]
    counts = [0, among[1], min(1, among[2]), among[3], among[4] // 3, 0, 1, among[7] - 1]
    calls = []

    def found(part, ranks, among):
        def made(i):
            calls.append(i)
            return part[i].tensor_split(3)

        return top_masks(made, [tensor >= 0 for tensor in part], counts, ranks, among)

    parts = [[tensor.tensor_split(world_size)[rank] for tensor in keys] for rank in range(world_size)]
    guessed = together(lambda part, ranks: found(part, ranks, among), parts)
    assert len(calls) == world_size * len(keys)
    counted = together(lambda part, ranks: found(part, ranks, None), parts)
    assert len(calls) == 3 * world_size * len(keys)
    for i, tensor in enumerate(keys):
        expected = oracle(tensor, counts[i])
        assert torch.equal(torch.cat([masks[i] for masks in guessed]), expected)
        assert torch.equal(torch.cat([masks[i] for masks in counted]), expected)


@pytest.mark.parametrize("name", adversaries())
def test_keys_that_are_not_random_after_all(name):
    """Nearly every guess is wrong here."""
    keys = adversaries()[name]
    for count in (0, 1, 48, 96, 97):
        parts = together(lambda part, ranks, count=count: top([part], [count], ranks, [97])[0], keys.split([30, 0, 67]))
        assert torch.equal(torch.cat(parts), oracle(keys, count))


@pytest.mark.parametrize("wrong", [(0, 0), (2047, 2047), (900, 1000), (1400, 1500), (NONE, NONE), (0, NONE - 1)])
def test_a_wrong_guess_costs_time_alone(monkeypatch, wrong):
    """The true digit lies near 1365; the last guess is right, and leaves everything open."""
    keys = random_parts([3000], barred=0)
    monkeypatch.setattr(select, "guess", lambda count, among: wrong)
    assert torch.equal(top(keys, [1000], among=[3000])[0], oracle(keys[0], 1000))


@pytest.mark.parametrize(("count", "among"), [(1, 1), (1, 2), (1, 10**9), (10**9, 10**9), (500, 1000), (999_999, 1_000_000), (1, 10**6)])
def test_guesses(count, among):
    """The digit of the expected key is in it, and it is no wider than luck demands."""
    low, high = guess(count, among)
    expected = (1 - count / among) * NONE
    assert 0 <= low <= min(expected, NONE - 1) <= high + 1 <= NONE
    deviation = (count * (among - count) / among**3) ** 0.5
    assert high - low <= 2 * NONE * (7 * deviation + 20 / among) + 2


@pytest.mark.parametrize("pieces", [[97], [1, 96], [64, 33], [63, 1, 33], [0, 97, 0], [30, 0, 67]])
def test_pieces_change_nothing(pieces):
    for name, keys in adversaries().items():
        for count in (0, 1, 50, 97):
            (found,) = top_masks(lambda i, keys=keys: keys.split(pieces), [torch.ones(97, dtype=torch.bool)], [count], ALONE)
            assert torch.equal(found, oracle(keys, count)), (name, count)
    with pytest.raises(AssertionError, match="96 keys, 97 elements"):
        top_masks(lambda i: [keys[1:]], [torch.ones(97, dtype=torch.bool)], [1], ALONE)


def test_of_nothing_nothing_is_chosen():
    assert guess(0, 10) == (NONE, NONE)
    with pytest.raises(AssertionError, match="11 of 10"):
        guess(11, 10)


def test_no_tensors():
    assert top([], []) == []


@pytest.mark.parametrize("count", [-1, 5])
def test_impossible_counts_are_our_own_bug(count):
    with pytest.raises(AssertionError, match=f"{count} of 4 elements of tensor 1"):
        top([int32([1]), int32([1, 2, 3, 4])], [1, count])


def choose_here(keys, counts, way):
    """On a gloo rank: its part of each tensor, chosen over the process group."""
    import torch.distributed as dist

    from raysparse.train.process import ranks_of

    if way == "torch":
        library.available = lambda: False  # of this process
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = [torch.tensor(part, dtype=torch.int32).tensor_split(size)[rank] for part in keys]
    group = dist.group.WORLD
    assert group is not None
    return [mask.tolist() for mask in top(mine, counts, ranks_of(group, torch.device("cpu")))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gloo_ranks(world_size, way):
    keys = [*adversaries().values(), int32([8]), int32([8, 8])]  # the last two leave ranks empty
    counts = [(29 * i) % 98 for i in range(len(keys) - 2)] + [1, 1]
    found = spawn(choose_here, world_size, [tensor.tolist() for tensor in keys], counts, way)
    for i, (tensor, count) in enumerate(zip(keys, counts, strict=True)):
        assert [bit for masks in found for bit in masks[i]] == oracle(tensor, count).tolist()


def test_more_elements_than_float32_can_count():
    """2^24 + 5 elements: a count or an index in float32 would be off by some."""
    n = (1 << 24) + 5
    tied = torch.zeros(n, dtype=torch.int32)
    (mask,) = top([tied], [n - 2], piece=1 << 23)
    assert int(mask.sum()) == n - 2
    assert bool(mask[: n - 2].all())
    keys = counter.random_keys(0, n, 5)
    count = (1 << 24) + 1
    (mask,) = top([keys], [count], piece=1 << 23)
    assert int(mask.sum()) == count
    assert int(keys[mask].min()) >= int(keys[~mask].max())
