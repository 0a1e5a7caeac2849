"""The native passes of a selection against their definitions, on every build and any number of threads."""

import random

import pytest
import torch

from raysparse.kernels import select

SIZES = [0, 1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 191, 193, 1000, 4099]
LEVELS = [(20, 11), (10, 10), (0, 10)]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """After it the setting is what it was: see `one_thread`."""
    torch.set_num_threads(request.param)


def drawn(seed, size):
    """Keys of all kinds, sign bits and extremes too, and who is eligible."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    span = rng.choice([1, 1 << 9, 1 << 20, 1 << 31])
    keys = torch.randint(-span, span, (size,), generator=generator).to(torch.int32)
    return keys, torch.rand(size, generator=generator) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])


def digits_of(keys, shift, bits):
    return [(key & 0x7FFFFFFF) >> shift & ((1 << bits) - 1) for key in keys.tolist()]


@pytest.mark.parametrize("size", SIZES)
def test_count_digits(build, threads, size):
    for seed, (shift, bits) in enumerate(LEVELS):
        keys, eligible = drawn(seed + size, size)
        for who in (eligible, None):
            expected = [0] * (1 << bits)
            for digit, counts in zip(digits_of(keys, shift, bits), [True] * size if who is None else who.tolist(), strict=True):
                expected[digit] += counts
            assert select.count_digits(keys, who, shift, bits).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("room", ["none", "enough", "more"])
def test_choose(build, threads, size, room):
    for seed in range(4):
        keys, eligible = drawn(seed + size, size)
        digits = digits_of(keys, 20, 11)
        low, high = sorted(random.Random(seed).choices([*digits, 0, 2047, 2048], k=2))
        between = [i for i in range(size) if eligible[i] and low <= digits[i] <= high]
        above = [bool(eligible[i]) and digits[i] > high for i in range(size)]
        rooms = {"none": 0, "enough": len(between), "more": len(between) + 7}
        mask, index, listed, num_above = select.choose(keys, eligible, 20, low, high, rooms[room])
        assert (mask.dtype, index.dtype, listed.dtype) == (torch.bool, torch.int64, torch.int32)
        assert mask.view(torch.uint8).tolist() == above  # no other bytes than 0 and 1
        assert index.tolist() == between
        assert torch.equal(listed, keys[index])
        assert num_above == sum(above)


@pytest.mark.parametrize("size", SIZES)
def test_refine(build, size):
    for seed, (shift, bits) in enumerate(LEVELS):
        listed, _ = drawn(seed + size, size)
        index = torch.randperm(2 * size, generator=torch.Generator().manual_seed(seed))[:size].sort().values
        before = torch.zeros(2 * size, dtype=torch.bool)
        before[::7] = True
        digits = torch.tensor(digits_of(listed, shift, bits), dtype=torch.int64)
        for digit in {0, (1 << bits) - 1, 1 << bits, *digits[:2].tolist()}:
            mask = before.clone()
            kept = select.refine(mask, index.clone(), listed.clone(), shift, bits, digit)
            expected = before.clone()
            expected[index[digits > digit]] = True
            assert torch.equal(mask, expected)
            assert torch.equal(kept[0], index[digits == digit])
            assert torch.equal(kept[1], listed[digits == digit])


def test_bits_of_a_byte_beside_the_lowest_do_not_count(build):
    """A bool tensor may be a view of other bytes."""
    eligible = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    keys = torch.tensor([5, 5, 5, 5], dtype=torch.int32) << 20
    assert int(select.count_digits(keys, eligible, 20, 11)[5]) == 2
    mask, index, _, _ = select.choose(keys, eligible, 20, 5, 5, 0)
    assert (mask.tolist(), index.tolist()) == ([False] * 4, [1, 3])


def test_a_foreign_index_is_left_alone(build):
    mask, keys = torch.zeros(4, dtype=torch.bool), torch.tensor([9, 9, 9], dtype=torch.int32)
    select.refine(mask, torch.tensor([-1, 4, 2**40]), keys, 0, 10, 8)
    assert not mask.any()


def test_a_mask_may_be_given(build):
    """It is overwritten, and nothing around it."""
    keys, eligible = drawn(2, 200)
    whole = torch.ones(300, dtype=torch.bool)
    mask, *_ = select.choose(keys, eligible, 20, 100, 900, 0, whole[50:250])
    assert mask.data_ptr() == whole[50:].data_ptr()
    assert torch.equal(mask, select.choose(keys, eligible, 20, 100, 900, 0)[0])
    assert whole[:50].all()
    assert whole[250:].all()


def test_views_inside_a_tensor(build):
    """Keys and masks that begin anywhere."""
    keys, eligible = drawn(1, 500)
    whole = select.choose(keys, eligible, 20, 100, 900, 500)
    for start in (1, 3, 17):
        part = select.choose(keys[start:], eligible[start:], 20, 100, 900, 500)
        assert torch.equal(part[0], whole[0][start:])
        assert torch.equal(part[1] + start, whole[1][whole[1] >= start])


KEYS, OK = torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: select.count_digits(KEYS.long(), OK, 20, 11), "int64"),
        (lambda: select.count_digits(KEYS.view(2, 2), None, 20, 11), "2, 2"),
        (lambda: select.count_digits(KEYS, OK[:3], 20, 11), "3"),
        (lambda: select.count_digits(KEYS, OK.byte(), 20, 11), "uint8"),
        (lambda: select.count_digits(KEYS[::2], None, 20, 11), "strides"),
        (lambda: select.count_digits(KEYS, OK, 0, 12), "12"),
        (lambda: select.count_digits(KEYS, OK, 21, 11), "21"),
        (lambda: select.choose(KEYS, OK, 20, 7, 6, 0), "7, 6"),
        (lambda: select.choose(KEYS, OK, 31, 0, 0, 0), "31"),
        (lambda: select.choose(KEYS, OK, 20, 0, 0, 0, OK[:3].clone()), "3"),
        (lambda: select.choose(KEYS.to("meta"), OK, 20, 0, 0, 0), "meta"),
        (lambda: select.refine(OK, KEYS, KEYS, 0, 10, 0), "int32"),
        (lambda: select.refine(OK, KEYS[:3].long(), KEYS, 0, 10, 0), "3"),
        (lambda: select.refine(OK.byte(), KEYS.long(), KEYS, 0, 10, 0), "uint8"),
    ],
)
def test_what_is_not_as_it_should_be_never_reaches_native_code(native, call, text):
    with pytest.raises(ValueError, match=text):
        call()
