"""Products with packed weights are products with the weights: of every kind and type, on every build, and without a native library."""

import copy
import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raysparse.kernels import decode, library
from raysparse.kernels.decode import Packed, pack
from tests.kernels.conftest import forget

KINDS = ("bits", "columns", "dense")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
ALL = [pytest.param(dtype, kind, id=f"{str(dtype)[6:]}-{kind}") for dtype in DTYPES for kind in KINDS]
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 64), (5, 63), (7, 65), (13, 131), (31, 257), (6, 768)]


def sparse(rows: int, cols: int, density: float = 0.25, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < density)


def inputs(tokens: int, cols: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """What int8 makes of activations: integers and a scale for each token."""
    largest = x.abs().amax(1, keepdim=True)
    return (x * (torch.tensor(32512.0) / largest)).round(), largest / 32512  # torch makes 32512 / x of two roundings


def exactly(weight: Packed, x: Tensor) -> Tensor:
    """By definition, in float64. x: [tokens, cols]."""
    if weight.scale is None:
        return x.double() @ decode.unpack(weight).double().t()
    q, scale = integers(x)
    elements = (decode.unpack(weight).double() / weight.scale.where(weight.scale > 0, 1.0).double().unsqueeze(1)).round()
    return (q.double() @ elements.t()) * (scale.double() * weight.scale.double())


@pytest.mark.parametrize(("dtype", "kind"), ALL)
def test_what_is_packed_is_the_weight(build, dtype, kind):
    for index, (rows, cols) in enumerate(SHAPES):
        dense = sparse(rows, cols, [0.25, 0, 1, 0.9][index % 4])
        weight = pack(dense, dtype, kind)
        assert decode.problem(weight) is None
        assert weight.kind == kind
        if dtype == torch.int8:
            assert bool(((decode.unpack(weight) - dense).abs() <= dense.abs().amax(1, keepdim=True) / 253).all()) if cols else True
        else:
            assert torch.equal(decode.unpack(weight), dense.to(dtype))
        assert torch.equal(decode.unpack(weight, rows // 3, rows - rows // 3), decode.unpack(weight)[rows // 3 : rows - rows // 3])


@pytest.mark.parametrize(("dtype", "kind"), ALL)
def test_products_are_those_of_the_definition(build, dtype, kind):
    for index, (rows, cols) in enumerate(SHAPES[2:]):
        weight = pack(sparse(rows, cols, [0.25, 0.05, 1][index % 3]), dtype, kind)
        for tokens in (0, 1, 2, 3, 5, 8, 9, decode.FEW_TOKENS):
            x, bias = inputs(tokens, cols, weight.dtype), inputs(1, rows, weight.dtype)[0]
            y, exact = decode.linear(weight, x), exactly(weight, x)
            if dtype == torch.int8:
                assert torch.equal(y, exact.float())  # sums of integers: the same bits on every build
                assert torch.equal(decode.linear(weight, x, bias), y + bias)
                continue
            bound = (x.double().abs() @ decode.unpack(weight).double().abs().t()) * 2**-23 * 8
            ulp = 2**-8 if dtype == torch.bfloat16 else 2**-23
            assert bool(((y.double() - exact).abs() <= bound + exact.abs() * ulp).all())
            biased = decode.linear(weight, x, bias).double()
            assert bool(((biased - exact - bias.double()).abs() <= bound + (exact + bias.double()).abs() * ulp + bound).all())


@pytest.mark.parametrize(("dtype", "kind"), ALL)
def test_many_tokens_are_multiplied_by_torch(native, dtype, kind, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 7 * 131 * 4)  # several blocks of rows
    weight = pack(sparse(31, 131), dtype, kind)
    x, bias = inputs(decode.FEW_TOKENS + 1, 131, weight.dtype), inputs(1, 31, weight.dtype)[0]
    expected = torch.nn.functional.linear(x, decode.unpack(weight), bias)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}  # blocks round otherwise
    torch.testing.assert_close(decode.linear(weight, x, bias), expected, **tolerance)


@pytest.mark.parametrize(("dtype", "kind"), ALL)
def test_threads_change_no_bit(build, dtype, kind, monkeypatch):
    monkeypatch.setattr(decode, "_SMALL", 0)
    weight = pack(sparse(37, 131), dtype, kind)
    for tokens in (1, 8):
        x, results = inputs(tokens, 131, weight.dtype), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(decode.linear(weight, x))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_leading_axes_and_strides(native):
    weight = pack(sparse(6, 70), torch.float32, "bits")
    x = inputs(12, 140, torch.float32).view(3, 4, 140)[..., ::2]
    assert not x.is_contiguous()
    y = decode.linear(weight, x)
    assert y.shape == (3, 4, 6)
    assert torch.equal(y.view(12, 6), decode.linear(weight, x.reshape(12, 70)))
    assert decode.linear(weight, x[0, 0]).shape == (6,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["bits", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dead_weight_hides_what_is_not_finite(build, dtype, kind, value):
    dense = sparse(40, 131)
    weight, x = pack(dense, dtype, kind), inputs(3, 131, dtype)
    finite = decode.linear(weight, x.index_fill(1, torch.tensor(5), 0))
    x[:, 5] = value
    y, live = decode.linear(weight, x), dense[:, 5] != 0
    assert live.any()
    assert not live.all()
    assert not y[:, live].isfinite().any()
    torch.testing.assert_close(y[:, ~live], finite[:, ~live], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_gives_nan_for_a_token_that_is_not_finite_and_zero_for_nothing(build, kind):
    weight, x = pack(sparse(9, 70), torch.int8, kind), inputs(4, 70, torch.float32)
    clean = decode.linear(weight, x)
    x[1, 69], x[2] = float("inf"), 1e-36
    y = decode.linear(weight, x)
    assert y[1].isnan().all()
    assert not y[2].any()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_pack_by_hand():
    #                 1.5 at 0, -2 at 2; none; 3 at 65
    dense = torch.zeros(3, 66)
    dense[0, 0], dense[0, 1], dense[0, 2], dense[2, 65] = 1.5, -0.0, -2, 3
    bits = pack(dense, torch.float32, "bits")
    assert bits.bits is not None
    assert bits.bits[:, :9].tolist() == [[5, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 9, [0, 0, 0, 0, 0, 0, 0, 0, 2]]
    assert bits.values.tolist() == [1.5, -2, 3] + [0] * 16
    columns = pack(dense, torch.bfloat16, "columns")
    assert columns.columns is not None
    assert columns.columns.tolist() == [0, 2, 65]
    small = pack(dense, torch.int8, "columns")
    assert small.values[:3].tolist() == [128 + 95, 128 - 127, 255]
    assert small.scale is not None
    torch.testing.assert_close(small.scale, torch.tensor([2 / 127, 0, 3 / 127]))
    for weight in (bits, columns, small):
        assert weight.starts is not None
        assert weight.starts.tolist() == [0, 2, 2, 3]
        assert weight.nbytes == sum(
            t.nbytes for t in (weight.values, weight.starts, weight.bits, weight.columns, weight.scale) if t is not None
        )


def test_int8_drops_what_rounds_to_zero():
    weight = pack(torch.tensor([[127.0, 0.4, 0.6, 0.0]]), torch.int8, "columns")
    assert weight.columns is not None
    assert weight.columns.tolist() == [0, 2]


#                         live of 100     float32    bfloat16   int8
@pytest.mark.parametrize(("live", "kinds"), [
    (95, ("dense", "dense", "dense")),
    (80, ("bits", "bits", "dense")),
    (25, ("bits", "bits", "bits")),
    (15, ("columns", "bits", "bits")),
    (0, ("columns", "bits", "bits")),
])  # fmt: skip
def test_choice_of_the_kind(live, kinds):
    weight = (torch.arange(1000) % 100 < live).float().view(10, 100)
    assert tuple(decode.choose(weight, dtype) for dtype in DTYPES) == kinds


def test_too_many_columns_stay_dense():
    assert decode.choose(torch.zeros(1, decode.MOST_COLS), torch.float32) == "columns"
    assert decode.choose(torch.zeros(1, decode.MOST_COLS + 1), torch.float32) == "dense"
    weight = pack(sparse(2, decode.MOST_COLS), torch.int8, "bits")
    x = torch.ones(1, decode.MOST_COLS)
    assert torch.equal(decode.linear(weight, x), exactly(weight, x).float())


BITS, COLUMNS = pack(sparse(4, 70), torch.float32, "bits"), pack(sparse(4, 70), torch.int8, "columns")


def changed(tensor: Tensor | None, index: Any, value: int) -> Tensor:
    assert tensor is not None
    copy = tensor.clone()
    copy.view(torch.int16 if copy.dtype == torch.uint16 else copy.dtype)[index] = value
    return copy


@pytest.mark.parametrize(("weight", "says"), [
    (replace(BITS, values=BITS.values.double()), "values of torch.float64"),
    (replace(BITS, values=BITS.values.view(1, -1)), r"values of torch.float32 \[1, "),
    (replace(BITS, values=BITS.values[:-16]), "starts that do not rise from 0 to"),
    (replace(BITS, values=BITS.values[:3]), r"values of torch.float32 \[3\], not torch.float32 \[16\]"),
    (replace(BITS, rows=5), r"starts of torch.int32 \[5\], not torch.int32 \[6\]"),
    (replace(BITS, cols=200), r"bits of torch.uint8 \[4, 16\], not torch.uint8 \[4, 32\]"),
    (replace(BITS, bits=None), "not one index"),
    (replace(BITS, columns=torch.zeros(len(BITS.values) - 16, dtype=torch.uint16)), "not one index"),
    (replace(BITS, starts=None, values=torch.zeros(4, 70)), "an index without starts"),
    (replace(BITS, scale=torch.ones(4)), "a scale for torch.float32 values"),
    (replace(BITS, starts=changed(BITS.starts, 1, 1000)), "starts that do not rise"),
    (replace(BITS, starts=changed(BITS.starts, 0, -1)), "starts that do not rise"),
    (replace(BITS, starts=changed(BITS.starts, 1, 0)), "bits that do not fit the starts"),
    (replace(BITS, bits=changed(BITS.bits, (0, 15), 128)), "bits that do not fit the starts"),
    (replace(COLUMNS, scale=None), "uint8 values without a scale"),
    (replace(COLUMNS, columns=changed(COLUMNS.columns, -1, 70)), "columns out of order or range"),
    (replace(COLUMNS, columns=changed(COLUMNS.columns, 1, 0)), "columns out of order or range"),
    (replace(COLUMNS, columns=changed(COLUMNS.columns, 1, -1)), "columns out of order or range"),
    (replace(COLUMNS, cols=70_000), "70000 columns, more than 65536"),
])  # fmt: skip
def test_what_is_unsound_is_told(weight, says):
    import re

    found = decode.problem(weight)
    assert found is not None
    assert re.search(says, found), found


def test_every_change_of_an_index_is_told_or_harmless(native):
    """Bytes of starts, bits and columns drawn anew: what passes the check is in bounds."""
    rng = random.Random(0)
    told = 0
    for weight, name in [(BITS, "starts"), (BITS, "bits"), (COLUMNS, "starts"), (COLUMNS, "columns")] * 40:
        array = getattr(weight, name).clone()
        flat = array.view(torch.uint8).view(-1)
        flat[rng.randrange(len(flat))] = rng.randrange(256)
        broken = replace(weight, **{name: array})
        if decode.problem(broken) is None:
            assert decode.linear(broken, inputs(2, 70, torch.float32)).isfinite().all()
        else:
            told += 1
    assert told > 100


@pytest.mark.parametrize(("dtype", "kind"), ALL)
def test_without_a_library_the_results_are_the_same(dtype, kind, monkeypatch):
    weight = pack(sparse(13, 131), dtype, kind)
    x, bias = inputs(3, 131, weight.dtype), inputs(1, 13, weight.dtype)[0]
    with_library, unpacked = decode.linear(weight, x, bias), decode.unpack(weight)
    monkeypatch.setenv(library.CHOICE, "off")
    forget()
    assert not library.available()
    assert torch.equal(decode.unpack(weight), unpacked)
    assert torch.equal(decode.unpack(weight, 3, 9), unpacked[3:9])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 1e-3}[dtype]
    torch.testing.assert_close(decode.linear(weight, x, bias), with_library, rtol=tolerance, atol=tolerance)
    monkeypatch.undo()
    forget()


def test_a_used_weight_can_be_copied_and_pickled():
    x = torch.randn(2, 70)
    expected = decode.linear(BITS, x)
    for other in (copy.deepcopy(BITS), pickle.loads(pickle.dumps(BITS))):
        assert torch.equal(decode.linear(other, x), expected)


def test_what_only_a_program_can_get_wrong():
    x = torch.zeros(1, 70)
    for wrong in (x.double(), x[:, 1:], x.requires_grad_()):
        with pytest.raises(ValueError, match=r"\w"):
            decode.linear(BITS, wrong)
    with pytest.raises(ValueError, match="bias"):
        decode.linear(BITS, torch.zeros(1, 70), torch.zeros(5))
    with pytest.raises(ValueError, match="int8 knows no inf"):
        pack(torch.full((1, 2), float("inf")), torch.int8, "bits")
    with pytest.raises(ValueError, match="3, 2"):
        decode.unpack(BITS, 3, 2)
