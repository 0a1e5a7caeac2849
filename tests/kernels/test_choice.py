"""Sparse or dense is measured, product by product."""

import time

import pytest
import torch

from raysparse.kernels import choice, library
from raysparse.kernels.choice import MARGIN, Gains, case, measure
from raysparse.kernels.linear import Products
from tests.kernels.streams import bits_of


def mask(rows: int, cols: int, density: float) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) < density


def test_a_case_names_what_a_measurement_depends_on(native):
    bits = bits_of(mask(96, 40, 0.25))
    name = case(bits, 40, 960, torch.bfloat16, 512)
    assert name == f"96x40 at 75 %, 512 tokens, bf16, {library.variant()}, threads 1"
    torch.set_num_threads(2)
    assert case(bits, 40, 960, torch.bfloat16, 512).endswith("threads 2")


@pytest.mark.parametrize(("nnz", "percent"), [(0, 100), (3840, 0), (3840 - 95, 0), (3840 - 97, 5), (1920, 50), (1900, 50)])
def test_sparsity_counts_in_steps_of_5_percent(native, nnz, percent):
    assert f"at {percent} %" in case(bits_of(mask(96, 40, 0.5)), 40, nnz, torch.float32, 1)


def test_an_empty_weight_has_a_case(native):
    assert case(torch.zeros(0, 1, dtype=torch.uint8), 8, 0, torch.float32, 1).startswith("0x8 at 100 %")


def test_a_product_is_sparse_from_the_margin_on():
    assert Gains(MARGIN, 1.0, 9.0).products == Products(forward=True, backward=False, gradient=True)
    assert not Gains(MARGIN - 1e-6, 0.5, 0.0).products.any


def test_the_fastest_of_each_counts(monkeypatch):
    """A clock that says how long each run took: the dense one 8, then 4 at best, the sparse one 2 at best."""
    durations = iter([8, 9, 8, 3, 7, 3, 4, 2, 9, 9, 5, 5])
    ticks = [0.0]

    def clock() -> float:
        ticks.append(ticks[-1] + (next(durations) if len(ticks) % 2 == 0 else 1))
        return ticks[-1]

    monkeypatch.setattr(choice.time, "perf_counter", clock)
    calls: list[str] = []
    assert choice._gain(lambda: calls.append("dense"), lambda: calls.append("sparse")) == 4 / 2  # type: ignore[arg-type]
    assert calls == ["dense", "sparse"] * (1 + choice.ROUNDS)


def test_each_product_is_measured_as_it_runs(native, monkeypatch):
    """Dense and sparse candidates compute the same thing, on no more tokens than are needed."""
    pairs = []
    monkeypatch.setattr(choice, "_gain", lambda dense, sparse: pairs.append((dense(), sparse())) or float(len(pairs)))
    live = torch.ones(24, 16, dtype=torch.bool)
    assert measure(bits_of(live), 16, torch.float32, 10**6) == Gains(1.0, 2.0, 3.0)
    assert [dense.shape for dense, _ in pairs] == [(choice.LONGEST["cpu"], 24), (choice.LONGEST["cpu"], 16), (24, 16)]
    for dense, sparse in pairs:
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_pay_where_nearly_all_are(native, dtype, monkeypatch):
    """What no machine can get wrong, by CPU time: of a wide layer 1 % is faster than all, and 100 % as a stream is not."""
    monkeypatch.setattr(choice.time, "perf_counter", time.process_time)
    few = measure(bits_of(mask(512, 512, 0.01)), 512, dtype, 128)
    all_live = measure(bits_of(mask(512, 512, 1.1)), 512, torch.float32, 128)
    assert min(few.forward, few.backward, few.gradient) > 1
    assert few.forward > all_live.forward
    assert not all_live.products.forward


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_measurement_of_next_to_nothing(native, tokens):
    assert all(gain > 0 for gain in vars(measure(bits_of(mask(3, 5, 0.5)), 5, torch.float32, tokens)).values())
