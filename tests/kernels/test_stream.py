"""Native sparse products against their definitions, on every build that this machine runs."""

import random
from dataclasses import replace
from itertools import chain, product

import pytest
import torch

from raysparse.kernels.stream import Stream, Use
from tests.kernels.streams import Case, assert_rounded, bits_of, check, draw, mask_of, products, tensors

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [0, 1, 7, 63, 64, 65, 130, 257, 389]
TOKENS = [0, 1, 63, 64, 65, 300]
DENSITIES = [0.0, 0.1, 0.25, 0.6, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("grain", [1, 2, 4])
def test_products_are_those_of_the_masked_dense_weight(build, dtype, grain):
    """Sizes that end inside, at and past a tile; tokens and densities in turn."""
    for seed, (rows, cols) in enumerate(chain(product(SIZES, SIZES[::4]), product(SIZES[::4], SIZES))):
        rows, cols = (-(-size // grain) * grain if size > 7 else size for size in (rows, cols))
        check(Case(rows, cols, TOKENS[seed % 6], DENSITIES[seed % 5], grain, dtype, bias=seed % 2 == 0, seed=seed))


@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(build, tokens):
    for dtype, density in product(DTYPES, DENSITIES):
        check(Case(70, 200, tokens, density, dtype=dtype, bias=True))


def test_drawn_cases(build):
    rng = random.Random(7)
    for _ in range(40):
        check(draw(rng))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("grain", [1, 2, 4])
def test_a_dead_weight_spreads_no_nan(build, dtype, grain):
    for density in (0.0, 0.1, 0.5, 1.0):
        case = Case(68, 132, 33, density, grain, dtype, bias=True, wild=True, garbage=True)
        assert not all(tensors(case)[name].isfinite().all() for name in ("x", "dy"))
        check(case)


def test_nan_where_a_token_or_row_has_one_and_nowhere_else(build):
    """columns: live  dead"""
    bits = torch.tensor([[0b01], [0b10]], dtype=torch.uint8)
    nan, inf = float("nan"), float("inf")
    weight, x = torch.tensor([[1.0, nan], [nan, 2.0]]), torch.tensor([[3.0, nan], [-inf, 4.0]])
    stream = Stream(bits, 2, torch.float32, Use.FORWARD)
    stream.load(weight)
    assert str(stream.multiply(x).tolist()) == "[[3.0, nan], [-inf, 8.0]]"
    assert str(Stream(bits, 2, torch.float32, Use.GRADIENT).gradient(x, torch.ones(2, 2)).tolist()) == "[[-inf, 0.0], [0.0, nan]]"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 65, 700])
def test_any_number_of_threads_gives_the_same_bits(build, dtype, tokens):
    """700 tokens are panels enough for each thread to have its own; with fewer the rows are shared out."""
    for grain in (1, 4):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(products(Case(520, 260, tokens, grain=grain, dtype=dtype, bias=True)))
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_bits_past_the_last_column_are_no_ones(build):
    for cols in (1, 7, 65, 201):
        clean = Case(33, cols, 5, dtype=torch.bfloat16)
        (a, b) = (products(case) for case in (clean, replace(clean, garbage=True)))
        assert bits_of(mask_of(clean), garbage=True).ne(bits_of(mask_of(clean))).any()
        assert all(torch.equal(b[name], value) for name, value in a.items())


@pytest.mark.parametrize(
    ("blocks", "forward", "backward"), [((1, 1), 1, 1), ((2, 1), 2, 1), ((4, 1), 4, 1), ((4, 2), 4, 2), ((4, 4), 4, 4)]
)
def test_grain_is_found_in_the_mask(build, blocks, forward, backward):
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = mask.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
    found = {use: Stream(bits_of(mask), mask.shape[1], torch.float32, use).grain for use in Use}
    assert found == {Use.FORWARD: forward, Use.BACKWARD: backward, Use.GRADIENT: forward}


def test_load_takes_over_what_changed(build):
    case = Case(40, 50, 9)
    t, live = tensors(case), mask_of(case)
    stream = Stream(bits_of(live), 50, torch.float32, Use.FORWARD)
    for factor in (1.0, -3.0):
        stream.load(t["weight"] * factor)
        weight = (t["weight"].nan_to_num() * live * factor).double()
        x = t["x"].double()
        assert_rounded(stream.multiply(t["x"]), x @ weight.t(), x.abs() @ weight.t().abs(), 50)


def test_bfloat16_is_rounded_once_to_the_nearest_even(build):
    """One live weight of 1: sums are the activation plus the bias, and those lie half-way between two bfloat16s."""
    stream = Stream(torch.tensor([[1]], dtype=torch.uint8), 1, torch.bfloat16, Use.FORWARD)
    stream.load(torch.ones(1, 1, dtype=torch.bfloat16))
    x = torch.tensor([[1.0], [1.0078125], [-1.0], [float("nan")], [3.0e38]], dtype=torch.bfloat16)
    bias = torch.tensor([2**-8])
    assert torch.equal(stream.multiply(x, bias).view(torch.int16)[:3], (x.float() + bias).bfloat16().view(torch.int16)[:3])
    assert stream.multiply(x, bias)[3].isnan()
    assert stream.multiply(x, torch.tensor([3.4e38]))[4].isinf()


def test_values_are_counted(native):
    stream = Stream(bits_of(torch.ones(8, 8, dtype=torch.bool)), 8, torch.float32, Use.FORWARD)
    gradient = Stream(bits_of(torch.ones(8, 8, dtype=torch.bool)), 8, torch.float32, Use.GRADIENT)
    assert stream.nbytes == gradient.nbytes + 8 * 8 * 4


# --- what may not reach native code -----------------------------------------------------------------------------------


def loaded(use: Use = Use.FORWARD) -> Stream:
    stream = Stream(bits_of(torch.ones(6, 10, dtype=torch.bool)), 10, torch.float32, use)
    if use is not Use.GRADIENT:
        stream.load(torch.ones(6, 10))
    return stream


def test_a_copy_has_memory_of_its_own(native):
    from copy import deepcopy

    stream = loaded()
    copy = deepcopy(stream)
    del stream
    with pytest.raises(ValueError, match="no weight was loaded"):
        copy.multiply(torch.ones(2, 10))
    copy.load(torch.ones(6, 10))
    assert torch.equal(copy.multiply(torch.ones(2, 10)), torch.full((2, 6), 10.0))


BAD = {
    "fewer columns than none": lambda: Stream(torch.ones(4, 0, dtype=torch.uint8), -1, torch.float32, Use.FORWARD),
    "a dtype that streams do not have": lambda: Stream(torch.ones(6, 2, dtype=torch.uint8), 10, torch.float16, Use.FORWARD),
    "bits of another dtype": lambda: Stream(torch.ones(6, 2), 10, torch.float32, Use.FORWARD),
    "too few bits": lambda: Stream(torch.ones(6, 1, dtype=torch.uint8), 10, torch.float32, Use.FORWARD),
    "too many bits": lambda: Stream(torch.ones(6, 3, dtype=torch.uint8), 10, torch.float32, Use.FORWARD),
    "bits with strides": lambda: Stream(torch.ones(2, 6, dtype=torch.uint8).t(), 10, torch.float32, Use.FORWARD),
    "a weight of another shape": lambda: loaded().load(torch.ones(10, 6)),
    "a weight of another dtype": lambda: loaded().load(torch.ones(6, 10, dtype=torch.bfloat16)),
    "a weight with strides": lambda: loaded().load(torch.ones(10, 6).t()),
    "a weight elsewhere": lambda: loaded().load(torch.ones(6, 10, device="meta")),
    "a weight for a gradient": lambda: loaded(Use.GRADIENT).load(torch.ones(6, 10)),
    "activations of another shape": lambda: loaded().multiply(torch.ones(3, 6)),
    "activations of another dtype": lambda: loaded().multiply(torch.ones(3, 10).double()),
    "activations with strides": lambda: loaded().multiply(torch.ones(10, 3).t()),
    "activations elsewhere": lambda: loaded().multiply(torch.ones(3, 10, device="meta")),
    "a bias of another shape": lambda: loaded().multiply(torch.ones(3, 10), torch.ones(5)),
    "a bias on the way back": lambda: loaded(Use.BACKWARD).multiply(torch.ones(3, 6), torch.ones(10)),
    "a gradient of other tokens": lambda: loaded(Use.GRADIENT).gradient(torch.ones(3, 10), torch.ones(4, 6)),
    "a gradient of another dtype": lambda: loaded(Use.GRADIENT).gradient(torch.ones(3, 10), torch.ones(3, 6).double()),
    "a gradient with strides": lambda: loaded(Use.GRADIENT).gradient(torch.ones(10, 3).t(), torch.ones(3, 6)),
    "a gradient of a product": lambda: loaded().gradient(torch.ones(3, 10), torch.ones(3, 6)),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_refused_before_native_code(native, call):
    with pytest.raises(ValueError, match=r"\w"):
        call()


def test_a_bias_of_any_kind_is_taken(native):
    for bias in (torch.arange(12.0)[::2], torch.arange(0.0, 12, 2).bfloat16()):
        assert torch.equal(loaded().multiply(torch.zeros(2, 10), bias), torch.arange(0.0, 12, 2).expand(2, 6))
